"""Promise 3 under fire: after any fault, an engine holds all of the old weights or all of the new.

One live engine a scheme. Every fault is followed by a comparison of everything the
kernels read, and by a complete update that must equal a fresh start. The seed and
the counts are in pytest's summary. `--hypothesis-profile long` injects twice as many.
"""

from __future__ import annotations

import functools
import os
import random
from collections.abc import Callable, Iterator
from functools import cached_property
from typing import Any, NamedTuple
from unittest import mock

import pytest
from hypothesis import HealthCheck, given, seed, settings
from hypothesis import strategies as st
from torch import Tensor

import flashquant
from flashquant import ReloadReport
from flashquant.errors import ReloadError
from flashquant.schemes import fingerprint
from flashquant.update import Stage, UndoLog
from tests.engine import faults
from tests.engine.faults import INJECTED, SEED
from tests.engine.serving import choosing, same_bits, serve
from tools.models.policies import Policies

pytestmark = pytest.mark.engine

# Packed tensors and closures (amx), a oneDNN handler (portable), transposed rows (fp8); and the
# undo log in the KV cache.
CASES = [
    ("bf16", "portable"),
    ("int8", "amx"),
    ("int8", "portable"),
    ("fp8_vllm", "native"),
    ("fp8_channel", "native"),
    ("fp8_channel", "native", "cache"),
    ("int4", "native"),
    ("mxfp8", "native"),
    ("nvfp4", "native"),
]

LONG = settings.default.max_examples > 100  # --hypothesis-profile long
EVERY = 1 if LONG else 2  # tensor that a kind of fault strikes, each kind beginning at another
CALLS_EACH = 9 if LONG else 6  # of one function in one scheme, spread over an update
INTERRUPTS = 40  # a scheme


class State(NamedTuple):
    """What a push may not change if it fails."""

    digest: str
    pending: dict[str, tuple[str, ...]]
    staged: dict[str, str]  # fingerprints of what has arrived, and waits


class Target:
    """One live engine, the two policies it may serve, and what was found wrong with it."""

    def __init__(self, scheme: str, kernels: str, policies: Policies, place: str = "host") -> None:
        self.name = f"{scheme}-{kernels}-{place}"
        start = functools.partial(serve, scheme=scheme, kernels=kernels, seed=place == "cache")
        self.live, self._fresh = (start(policies.bf16(policy)) for policy in "ab")
        self._clear_cache()
        self.pushed = {policy: list(policies.tensors(policy).items()) for policy in "ab"}
        self.violations: list[str] = []
        self.serves = "b"
        report = self.reload()
        assert (report.undo_cache_bytes > 0) == (place == "cache")

    @cached_property
    def right(self) -> dict[str, dict[str, Tensor]]:
        """What an engine that started on a policy holds."""
        return {"a": self.live.start.contents, "b": self._fresh.start.contents}

    @property
    def other(self) -> str:
        return "b" if self.serves == "a" else "a"

    def reload(self, weights: Any = None) -> ReloadReport:
        """Update to the other policy, completely; or to what is given, and that is to fail."""
        report = flashquant.reload_weights(self.live.llm, weights or self.pushed[self.other])
        self.serves = self.other
        return report

    def inject(self, what: str, call: Callable[[], object], *, late: bool = False) -> None:
        """Let a call fail, look at the engine, and see whether the next update goes through.

        Args:
            what: the fault, for the report.
            call: raises.
            late: it may do so when the update stands already, as a signal can.

        """
        INJECTED[self.name] += 1
        before, allowed = self.serves, "ab" if late else self.serves
        try:
            call()
        except (Exception, KeyboardInterrupt, SystemExit):
            pass
        else:
            self._note(what, "nothing was raised")
        held = [policy for policy in "ab" if self._holds(policy)]
        if not held or held[0] not in allowed:
            self._note(what, f"serves {held or 'a mixture'}, and was on {before}")
        if any(cache.any() for cache in self._caches):
            self._note(what, "left something in the KV cache")
            self._clear_cache()
        if flashquant.status(self.live.llm).pending:
            self._note(what, "left something pending")
        self.serves = held[0] if held else before
        self._update(what)

    @property
    def _caches(self) -> list[Tensor]:
        executor = self.live.llm.llm_engine.model_executor
        caches: list[Tensor] = executor.driver_worker.worker.model_runner.kv_caches
        return caches

    def _clear_cache(self) -> None:
        for cache in self._caches:
            cache.zero_()

    def state(self) -> State:
        status, engine = flashquant.status(self.live.llm), self.live.session._engine
        staged = {
            f"{name} {view}": fingerprint(view.into(stage.memory(engine.device)))
            for layer in engine.layers
            for name in layer.targets
            for stage in [layer.stage(name)]
            for view in stage.windows
        }
        return State(status.digest or "", dict(status.pending), staged)

    def _update(self, what: str) -> None:
        try:
            self.reload()
        except ReloadError as failure:
            self._note(what, f"the next update failed: {failure}")
        if not self._holds(self.serves):
            self._note(what, "the next update does not equal a fresh start")

    def _holds(self, policy: str) -> bool:
        held, right = self.live.contents(), self.right[policy]
        return all(same_bits(held[name], right[name]) for name in right)

    def _note(self, what: str, violation: str) -> None:
        self.violations.append(f"{self.name}, {what}: {violation}")


@pytest.fixture(scope="module")
def policies(tmp_path_factory: pytest.TempPathFactory) -> Policies:
    return Policies(tmp_path_factory.mktemp("policies"), "qwen2")


@pytest.fixture(scope="module", params=CASES, ids="-".join)
def target(request: pytest.FixtureRequest, policies: Policies) -> Iterator[Target]:
    scheme, kernels, place = (*request.param, "host")[:3]
    place = os.environ.get("FLASHQUANT_UNDO", place)  # of all of them, where it is set
    with choosing(kernels), pytest.MonkeyPatch.context() as patch:
        patch.setenv("FLASHQUANT_UNDO", place)
        yield Target(scheme, kernels, policies, place)


def test_wrong_weights_at_every_tensor(target: Target) -> None:
    """Every fault of the stream; every tensor of an update."""
    for number, (kind, stream) in enumerate(faults.STREAMS.items()):
        for index in range(number % EVERY, len(target.pushed["a"]), EVERY):
            weights = stream(target.pushed[target.other], index)
            target.inject(f"{kind} at {index}", lambda weights=weights: target.reload(weights))

    assert target.violations == []


def test_a_failure_in_every_function(target: Target) -> None:
    """Out of memory, Ctrl-C or a broken kernel, in one call after the other."""
    for point in faults.CALLS:
        with faults.counted(point) as calls:
            target.reload()
        for number in faults.spread(calls(), CALLS_EACH):
            target.inject(
                f"{point}, call {number}",
                lambda call=(point, number): reload_failing(target, *call),
            )

    assert target.violations == []


def test_ctrl_c_between_any_two_lines(target: Target) -> None:
    """A real SIGINT, at random lines of flashquant's own code."""
    lines = faults.lines(target.reload)
    dice = random.Random(f"{SEED} {target.name}")

    for line in sorted(dice.sample(range(lines), INTERRUPTS)):
        target.inject(
            f"SIGINT at line {line} of {lines}",
            lambda line=line: faults.interrupted(target.reload, line),
            late=True,
        )

    assert target.violations == []


def reload_failing(target: Target, point: faults.Point, number: int) -> None:
    with faults.failing(point, number):
        target.reload()


IN_A_PUSH = sorted(faults.STREAMS.keys() - {"missing"})  # a push need not be complete
STEPS = st.lists(
    st.one_of(
        st.tuples(st.just("update"), st.sampled_from("ab"), st.none()),
        st.tuples(
            st.just("update"), st.sampled_from("ab"), st.sampled_from(sorted(faults.STREAMS))
        ),
        st.tuples(st.just("push"), st.sampled_from("ab"), st.none()),
        st.tuples(st.just("push"), st.sampled_from("ab"), st.sampled_from(IN_A_PUSH)),
    ),
    min_size=2,
    max_size=8,
)


@seed(SEED)
@settings(
    max_examples=20,
    deadline=None,
    database=None,
    suppress_health_check=[HealthCheck.function_scoped_fixture, HealthCheck.too_slow],
)
@given(steps=STEPS, dice=st.randoms(use_true_random=False))
def test_any_sequence_of_updates_and_pushes(
    target: Target, steps: list[tuple[str, str, str | None]], dice: random.Random
) -> None:
    """Whole updates and single pushes, good ones and bad ones, in any order.

    What fails changes nothing, neither what is live nor what waits for the rest of
    its layer; in the end a complete update equals a fresh start.
    """
    for door, policy, fault in steps:
        pairs = list(target.pushed[policy])
        if door == "push":
            dice.shuffle(pairs)
            pairs = pairs[: dice.randint(1, len(pairs))]
        take = target.live.model.load_weights if door == "push" else target.reload
        if fault is None:
            take(iter(pairs))
            continue
        before = target.state()
        INJECTED[target.name] += 1
        with pytest.raises((Exception, KeyboardInterrupt, SystemExit)):
            take(faults.STREAMS[fault](pairs, dice.randrange(len(pairs))))
        # A whole update begins by dropping what had half arrived.
        expected = before if door == "push" else State(before.digest, {}, {})
        assert target.state() == expected

    target._update("after a sequence")
    assert target.violations == []


BROKEN: dict[str, tuple[type, str, Callable[..., Any]]] = {
    "the log is thrown away": (UndoLog, "restore", UndoLog.forget),
    "the log ends early": (UndoLog, "restore", lambda log: log._steps and log._steps.pop()()),
    "what was staged stays": (Stage, "forget", lambda stage, view: None),
}


@pytest.mark.parametrize("broken", BROKEN)
def test_a_roll_back_that_was_broken_on_purpose_is_seen(target: Target, broken: str) -> None:
    """These tests can fail: each of these breaks the promise, and is found out."""
    owner, name, replacement = BROKEN[broken]
    pairs = target.pushed[target.other]

    with mock.patch.object(owner, name, replacement):
        for index in range(1, len(pairs), 3):
            stream = faults.STREAMS["NaN"](pairs, index)
            target.inject(broken, lambda stream=stream: target.reload(stream))
    found, target.violations = target.violations, []
    target.reload()

    assert found
