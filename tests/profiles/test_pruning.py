"""int8_prune: FlashRL's silencing of norms, for pushes in any order and any number."""

from __future__ import annotations

import itertools

import pytest
import torch

from flashquant.errors import MisfitTensor, ProfileError
from flashquant.profiles import Entry
from flashquant.profiles.pruning import Pruning
from flashquant.schemes.smoothed import int8_frozen
from flashquant.update import Session
from tests.profiles.test_calibration import FIELDS, opened
from tests.support.fake_engine import NEW, FakeEngine

ORDERS = list(itertools.permutations(["q.weight", "k.weight", "norm.weight"]))


def pruned() -> tuple[FakeEngine, Session]:
    """An engine of which the norm is read by `q.weight` alone."""
    return opened(prunes=True)


def with_dead(*columns: int) -> dict[str, torch.Tensor]:
    weights = {name: tensor.clone() for name, tensor in NEW.items()}
    weights["q.weight"][:, list(columns)] = 0
    return weights


def wanted(weights: dict[str, torch.Tensor]) -> torch.Tensor:
    """The norm, worked out from FlashRL's description on the whole model at once."""
    fields = FIELDS["q.weight"]
    codes = torch.round(weights["q.weight"] * fields["output_scale"] * fields["input_scale"])
    norm = (weights["norm.weight"] * FIELDS["norm.weight"]["input_scale"]).bfloat16()
    return norm * ~(codes == 0).all(0)


@pytest.mark.parametrize("order", ORDERS, ids="-".join)
@pytest.mark.parametrize("alone", [True, False], ids=["a call each", "one update"])
def test_a_channel_that_nobody_reads_is_silenced_in_any_order(order, alone):
    engine, session = pruned()
    weights = with_dead(1, 3)
    rest = weights.keys() - set(order)
    pairs = [(name, weights[name]) for name in (*order, *sorted(rest))]

    if alone:
        for pair in pairs:
            session.push([pair])
    else:
        session.reload(pairs)

    assert torch.equal(engine.live["norm.weight"], wanted(weights))
    assert engine.live["norm.weight"][[1, 3]].eq(0).all()


def test_a_channel_that_is_read_again_is_heard_again():
    engine, session = pruned()
    session.reload(with_dead(1))

    session.reload(NEW)

    assert torch.equal(engine.live["norm.weight"], wanted(NEW))


def test_codes_alone_silence_a_norm_that_came_earlier():
    engine, session = pruned()
    session.reload(NEW)

    session.push([(name, with_dead(2)[name]) for name in ("q.weight", "k.weight")])

    assert torch.equal(engine.live["norm.weight"], wanted(with_dead(2)))


def test_the_norm_may_still_come_after_the_codes_that_silence_it():
    engine, session = pruned()
    weights = with_dead(0)

    session.begin()
    for name in ("q.weight", "k.weight", "norm.weight"):
        session.push([(name, weights[name])])
    with pytest.raises(MisfitTensor, match=r"norm\.weight arrived twice"):
        session.push([("norm.weight", weights["norm.weight"])])

    assert engine.live["norm.weight"].eq(1).all()


@pytest.mark.parametrize("order", ORDERS, ids="-".join)
def test_a_failed_update_leaves_no_trace_in_what_is_silenced(order):
    engine, session = pruned()
    session.reload(NEW)
    bad = [(name, with_dead(1)[name]) for name in order]
    bad.append(bad[0])  # twice

    with pytest.raises(MisfitTensor):
        session.reload(bad, strict=False)
    session.push([("norm.weight", NEW["norm.weight"])])

    assert torch.equal(engine.live["norm.weight"], wanted(NEW))


def entry(kind: torch.dtype, *factors: float) -> Entry:
    return Entry(kind, torch.tensor(factors, dtype=torch.float32), None)


def test_a_channel_is_dead_when_all_readers_agree():
    pruning = Pruning(
        {
            "l.0.norm": entry(torch.float32, 2, 2, 2),
            "l.0.a": entry(torch.int8, 0.5, 0.5, 0.5),
            "l.0.b": entry(torch.int8, 0.5, 0.5, 0.5),
            "l.1.a": entry(torch.int8, 0.5, 0.5, 0.5),  # of another block
        }
    )
    pruning.norm("l.0.norm", torch.tensor([5.0, 6, 7]))

    assert pruning.codes("l.1.a", torch.zeros(2, 3)) is None
    assert pruning.codes("l.0.a", torch.tensor([[0, 0, 1]])) is None
    assert pruning.codes("l.0.b", torch.tensor([[0, 1, 0]])) is not None
    assert pruning.norm("l.0.norm", torch.tensor([5.0, 6, 7])).tolist() == [0, 6, 7]


def test_readers_of_two_syncs_do_not_silence_a_norm_together():
    """A trainer died when one of two readers had come; the next one sends the other first."""
    reader = entry(torch.int8, 0.5, 0.5)
    pruning = Pruning({"l.0.norm": entry(torch.float32, 2, 2), "l.0.a": reader, "l.0.b": reader})
    pruning.norm("l.0.norm", torch.tensor([5.0, 6]))
    pruning.codes("l.0.a", torch.tensor([[0, 1]]))

    pruning.begin_anew()

    assert pruning.codes("l.0.b", torch.tensor([[0, 1]])) is None
    assert pruning.codes("l.0.a", torch.tensor([[1, 1]])) is None
    assert pruning.norm("l.0.norm", torch.tensor([5.0, 6])).tolist() == [5, 6]


def test_readers_that_came_with_the_push_that_begins_a_sync_count():
    reader = entry(torch.int8, 0.5, 0.5)
    pruning = Pruning({"l.0.norm": entry(torch.float32, 2, 2), "l.0.a": reader, "l.0.b": reader})
    pruning.norm("l.0.norm", torch.tensor([5.0, 6]))
    pruning.codes("l.0.a", torch.tensor([[0, 1]]))

    pruning.begin_anew({"l.0.a"})

    assert pruning.codes("l.0.b", torch.tensor([[0, 1]])) is not None


def test_two_norms_with_the_same_factors_are_not_told_apart():
    norms = {f"l.0.norm{i}": entry(torch.float32, 1.0, 1.0) for i in range(2)}

    with pytest.raises(ProfileError, match=r"l\.0\.a may read l\.0\.norm0 or l\.0\.norm1"):
        Pruning({**norms, "l.0.a": entry(torch.int8, 1.0, 1.0)})


def test_the_codes_themselves_are_not_touched():
    engine, session = pruned()
    session.reload(with_dead(1))
    rows = torch.tensor([50.0, 60, 70, 80])
    columns = torch.tensor([0.5, 1, 2, 4])

    codes = int8_frozen(with_dead(1)["q.weight"], columns, rows).codes

    assert torch.equal(engine.live["qkv.weight"][:4], codes)
