"""Any sequence of syncs by trainers as they are: right, or named.

Trainers push a tensor a call, in buckets, or in a bracket, whole or in part; in the order of the
modules or of the file; they log a refusal and go on, or send it again; they die anywhere, in an
open bracket too; leave frozen parts out, name tied weights twice. Others write past every door in
between. After a whole sync that nothing was refused of, every layer equals that of a fresh engine,
or an error or `status` names it; what was not sent is as it was.

`--hypothesis-profile long` runs ten times as many sequences, on each engine.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any
from unittest import mock

import pytest
import torch
from hypothesis import HealthCheck, given, seed, settings
from hypothesis import strategies as st

from flashquant.update import Stage
from flashquant.update.passes import Passes
from tests.engine.habits import POLICIES, STEPS, Engine, Trainer, Writer

pytestmark = pytest.mark.engine

SEED = 20261126
SEQUENCES = 2 * settings.default.max_examples  # on each engine


@pytest.fixture(scope="module", params=["fp8_channel", "int8", "fp8_vllm", "bf16"])
def engine(
    request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory
) -> Iterator[Engine]:
    yield from made(request.param, tmp_path_factory)


@pytest.fixture(scope="module", params=["int4", "mxfp8", "nvfp4"])
def packed(
    request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory
) -> Iterator[Engine]:
    yield from made(request.param, tmp_path_factory)


def made(scheme: str, factory: pytest.TempPathFactory) -> Iterator[Engine]:
    engine = Engine(scheme, factory.mktemp(scheme))
    with torch.no_grad():
        yield engine
    print(f"{scheme}: {dict(engine.seen)}, seed {SEED}")


def sequences(number: int) -> Callable[..., Any]:
    """So many examples, the same ones in every run."""

    def decorated(test: Callable[..., Any]) -> Callable[..., Any]:
        unhealthy = [HealthCheck.function_scoped_fixture, HealthCheck.too_slow]
        chosen = settings(
            max_examples=number, deadline=None, database=None, suppress_health_check=unhealthy
        )
        return seed(SEED)(chosen(test))

    return decorated


@sequences(SEQUENCES)
@given(steps=STEPS)
def test_any_sequence_of_syncs_is_right_or_named(
    engine: Engine, steps: list[Trainer | Writer | str]
) -> None:
    assert_right_or_named(engine, steps)


@sequences(SEQUENCES // 10)
@given(steps=STEPS)
def test_it_is_so_too_where_layers_are_packed_on_a_twin(
    packed: Engine, steps: list[Trainer | Writer | str]
) -> None:
    """They wait longer: for all of a layer, of a fused one too."""
    assert_right_or_named(packed, steps)


def assert_right_or_named(engine: Engine, steps: list[Trainer | Writer | str]) -> None:
    engine.start()
    for step in steps:
        if not isinstance(step, Trainer):
            engine.other(step)
            continue
        before, whole = engine.status, engine.run(step)
        engine.seen[f"{step.door}, {'whole' if whole else 'cut short'}"] += 1
        if whole:
            engine.check(step, before)
    engine.start()


ONE_ORDER = st.lists(
    st.builds(
        Trainer,
        policy=st.sampled_from(POLICIES),
        bad=st.lists(st.tuples(st.integers(0, 12), st.just("NaN")), max_size=2).map(tuple),
        when_refused=st.sampled_from(["goes on", "gives up"]),
        dies_after=st.one_of(st.none(), st.integers(1, 12)),
    ),
    max_size=4,
)


@sequences(SEQUENCES // 4)
@given(before=ONE_ORDER)
def test_after_whatever_trainers_of_one_order_left_a_whole_sync_equals_a_fresh_start(
    engine: Engine, before: list[Trainer]
) -> None:
    """TRL, OpenRLHF, AReaL: a tensor a call, the whole model, in one order."""
    engine.start()
    for trainer in before:
        engine.run(trainer)

    assert engine.run(Trainer("c"))

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
    dead, partial = Trainer("c", dies_after=8), Trainer("b", frozen="shards")
    owner, name, replacement = BROKEN[broken]

    engine.start()
    engine.run(dead)
    assert engine.run(partial)
    engine.check(partial, engine.status)

    engine.start()
    with mock.patch.object(owner, name, replacement):
        engine.run(dead)
        assert engine.run(partial)
    with pytest.raises(AssertionError, match="nobody says so"):
        engine.check(partial, engine.status)
    engine.start()
