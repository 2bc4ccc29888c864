"""Any sequence of syncs by trainers as they are: right, or named.

Trainers push a tensor a call, in buckets, or in a bracket; in the order of the modules or of the
file; they log a refusal and go on, die anywhere, leave frozen parts out, name tied weights twice.
Others write past every door in between. After a whole sync that nothing was refused of, every
layer equals that of a fresh engine, or an error or `status` names it.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import suppress
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any
from unittest import mock

import pytest
import torch
from hypothesis import HealthCheck, given, seed, settings
from hypothesis import strategies as st
from torch import Tensor

import flashquant
from flashquant.errors import ReloadError
from flashquant.update import Stage, Status
from flashquant.update.passes import Passes
from tests.engine.serving import serve
from tools.models import tiny_models

pytestmark = pytest.mark.engine

SEED = 20261126
SEQUENCES = 500  # on each of two engines
POLICIES = "abc"
FROZEN = {
    "nothing": (),
    "the embeddings": ("embed_tokens",),
    "a layer": ("o_proj", "gate_proj", "up_proj"),
    "shards": ("k_proj", "up_proj"),
}


@dataclass(frozen=True)
class Trainer:
    """One sync of one trainer."""

    policy: str
    door: str  # one: a tensor a call; few: buckets; bracket
    order: str
    frozen: str
    tied: bool  # names the head as well
    says_done: bool
    bad: frozenset[int]  # tensors that hold NaN
    goes_on: bool  # after a refusal
    dies_after: int | None  # tensors


TRAINERS = st.builds(
    Trainer,
    policy=st.sampled_from(POLICIES),
    door=st.sampled_from(["one", "one", "few", "bracket"]),
    order=st.sampled_from(["modules", "file"]),
    frozen=st.sampled_from(["nothing", "nothing", *FROZEN]),
    tied=st.booleans(),
    says_done=st.booleans(),
    bad=st.one_of(
        st.just(frozenset()), st.just(frozenset()), st.frozensets(st.integers(0, 14), max_size=2)
    ),
    goes_on=st.booleans(),
    dies_after=st.one_of(st.none(), st.none(), st.integers(1, 14)),
)
STEPS = st.lists(st.one_of(TRAINERS, TRAINERS, TRAINERS, st.just("somebody writes")), max_size=6)


class Engine:
    """A tiny engine, and what a fresh one holds of each policy, layer by layer."""

    def __init__(self, scheme: str, folder: Path) -> None:
        paths = {
            policy: tiny_models.make(
                "qwen3",
                number,
                folder / policy,
                tied=True,
                hidden=128,
                layers=1,
                intermediate=128,
            )
            for number, policy in enumerate(POLICIES)
        }
        self.pushed = {policy: tiny_models.tensors(path) for policy, path in paths.items()}
        self.live = serve(paths["a"], scheme)
        self.right: dict[str, dict[str, str]] = {}
        for policy in POLICIES:
            flashquant.reload_weights(self.live.llm, self.pushed[policy])
            self.right[policy] = dict(self.status.parameters)
        fresh = serve(paths["b"], scheme)
        assert dict(flashquant.status(fresh.llm).parameters) == self.right["b"]
        self.seen: Counter[str] = Counter()

    @property
    def status(self) -> Status:
        return flashquant.status(self.live.llm)

    @cached_property
    def layers(self) -> dict[str, tuple[set[str], set[str]]]:
        """The things that kernels read of each layer, and the names that trainers send of it."""
        session = self.live.session
        return {
            layer.name: (
                {name for name, _ in layer.contents()},
                {
                    name
                    for name in self.pushed["a"]
                    if not set(layer.targets).isdisjoint(session.plan[name].targets)
                },
            )
            for layer in session._engine.layers
        }

    def start(self) -> None:
        """Policy A, whole, and nothing that an earlier sequence has taught or left."""
        flashquant.reload_weights(self.live.llm, self.pushed["a"])
        with suppress(ReloadError):
            self.live.session.check_nothing_waits()
        self.live.session.check_nothing_waits()

    def tensors(self, trainer: Trainer) -> list[tuple[str, Tensor]]:
        """What it sends, in its order."""
        weights = dict(self.pushed[trainer.policy])
        if trainer.tied:
            weights["lm_head.weight"] = weights["model.embed_tokens.weight"]
        left_out = FROZEN[trainer.frozen]
        names = [name for name in weights if not any(part in name for part in left_out)]
        names.sort(key=_place if trainer.order == "modules" else str)
        return [
            (name, weights[name] * torch.nan if place in trainer.bad else weights[name])
            for place, name in enumerate(names)
        ]

    def run(self, trainer: Trainer) -> bool:
        """One sync; whether it came to its end, and nobody was told no."""
        pairs = self.tensors(trainer)
        if trainer.door == "bracket":
            return self._bracket(trainer, pairs)
        size, refused = 1 if trainer.door == "one" else 4, False
        for first in range(0, len(pairs), size):
            if trainer.dies_after is not None and first >= trainer.dies_after:
                return False
            try:
                self.live.model.load_weights(pairs[first : first + size])
            except ReloadError:
                refused = True
                missed = {name for name, _ in pairs[first : first + size]}
                assert missed <= set(self.status.refused)
                assert self.status.refusal is not None
                assert set(self.status.refusal.names) == missed
                if not trainer.goes_on:
                    return False
        if trainer.says_done:
            try:
                self.live.session.check_nothing_waits()
            except ReloadError:
                return False
        return not refused

    def _bracket(self, trainer: Trainer, pairs: list[tuple[str, Tensor]]) -> bool:
        session, before = self.live.session, self.status.digest
        session.begin()
        try:
            for number, pair in enumerate(pairs):
                if number == trainer.dies_after:
                    raise ReloadError("the trainer died")
                session.push([pair])
            session.finish()
        except ReloadError:
            session.abandon()
            assert self.status.digest == before
            return False
        return True

    def check(self, trainer: Trainer) -> None:
        """After a whole sync: each layer that was sent is the policy's, or is named."""
        status, right = self.status, self.right[trainer.policy]
        sent = {name for name, _ in self.tensors(trainer)}
        for layer, (things, names) in self.layers.items():
            if names.isdisjoint(sent):
                continue
            same = all(status.parameters[thing] == right[thing] for thing in things)
            named = layer in status.pending or layer in status.dropped
            self.seen["right" if same else "named"] += 1
            assert same or named, f"{layer} is a mixture, and nobody says so: {status}"
            if names <= sent and not named:
                assert same

    def somebody_writes(self) -> None:
        norm = dict(self.live.model.named_parameters())["model.norm.weight"]
        norm.data.add_(1)
        norm.add_(0)  # counted, as copy_ is
        assert "model.norm.weight" in self.status.foreign


def _place(name: str) -> tuple[int, str]:
    """Where modules stand in the model."""
    parts = ("embed", "input_layernorm", "q_proj", "k_proj", "v_proj", "o_proj", "q_norm", "k_norm")
    parts += ("gate", "up", "down", "post", "model.norm", "lm_head")
    return next(place for place, part in enumerate(parts) if part in name), name


@pytest.fixture(scope="module", params=["fp8_channel", "int8"])
def engine(
    request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory
) -> Iterator[Engine]:
    made = Engine(request.param, tmp_path_factory.mktemp(request.param))
    with torch.no_grad():
        yield made
    print(f"{request.param}: {dict(made.seen)}, seed {SEED}")


@seed(SEED)
@settings(
    max_examples=SEQUENCES,
    deadline=None,
    database=None,
    derandomize=False,
    suppress_health_check=[HealthCheck.function_scoped_fixture, HealthCheck.too_slow],
)
@given(steps=STEPS)
def test_any_sequence_of_syncs_is_right_or_named(
    engine: Engine, steps: list[Trainer | str]
) -> None:
    engine.start()
    for step in steps:
        if isinstance(step, str):
            engine.somebody_writes()
        elif engine.run(step):
            engine.check(step)


ONE_ORDER = st.lists(
    st.builds(
        Trainer,
        policy=st.sampled_from(POLICIES),
        door=st.just("one"),
        order=st.just("file"),
        frozen=st.just("nothing"),
        tied=st.just(False),
        says_done=st.just(False),
        bad=st.frozensets(st.integers(0, 12), max_size=2),
        goes_on=st.booleans(),
        dies_after=st.one_of(st.none(), st.integers(1, 12)),
    ),
    max_size=4,
)


@seed(SEED)
@settings(
    max_examples=100,
    deadline=None,
    database=None,
    suppress_health_check=[HealthCheck.function_scoped_fixture, HealthCheck.too_slow],
)
@given(before=ONE_ORDER)
def test_after_whatever_trainers_of_one_order_left_a_whole_sync_equals_a_fresh_start(
    engine: Engine, before: list[Trainer]
) -> None:
    """TRL, OpenRLHF, AReaL: a tensor a call, the whole model, in one order."""
    engine.start()
    for trainer in before:
        engine.run(trainer)

    assert engine.run(Trainer("c", "one", "file", "nothing", False, False, frozenset(), True, None))

    assert dict(engine.status.parameters) == engine.right["c"]
    assert engine.status.pending == engine.status.dropped == {}
    assert engine.status.refused == ()


BROKEN: dict[str, tuple[type, str, Callable[..., Any]]] = {
    "no sync ever begins": (Passes, "begins_with", lambda *_: False),
    "what waits is not dropped": (Stage, "keep_only", lambda *_: None),
}


@pytest.mark.parametrize("broken", BROKEN)
def test_a_rule_that_was_broken_on_purpose_is_seen(engine: Engine, broken: str) -> None:
    """A trainer dies when its k has come; the next one never sends k."""
    dead = Trainer("c", "one", "file", "nothing", False, False, frozenset(), False, 8)
    partial = Trainer("b", "one", "file", "shards", False, False, frozenset(), False, None)
    owner, name, replacement = BROKEN[broken]

    engine.start()
    engine.run(dead)
    assert engine.run(partial)
    engine.check(partial)

    engine.start()
    with mock.patch.object(owner, name, replacement):
        engine.run(dead)
        assert engine.run(partial)
    with pytest.raises(AssertionError, match="nobody says so"):
        engine.check(partial)
    engine.start()
