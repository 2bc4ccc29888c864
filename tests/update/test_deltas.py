"""A bundle goes onto the policy it starts from, whole, or nothing changes."""

from __future__ import annotations

import logging
import math

import pytest
import torch

from flashquant.errors import BrokenDelta, IncompleteUpdate, MisfitTensor, StaleBase
from flashquant.sender import Change, Delta, Sender, TensorSpec
from flashquant.update import Deltas
from flashquant.update.deltas import _check_finite
from tests.support.fake_engine import NEW, OLD, FakeEngine, breaking, fresh, serves, serving


def moved(weights, seed):
    """The next policy: a few weights move."""
    dice = torch.Generator().manual_seed(seed)
    return {
        name: torch.where(torch.rand(tensor.shape, generator=dice) < 0.2, -tensor, tensor)
        for name, tensor in weights.items()
    }


def without_head(weights):
    return {name: tensor for name, tensor in weights.items() if name != "lm_head.weight"}


class Packs(FakeEngine):
    """An engine whose kernels pack q and k, so that live memory shows no codes."""

    def __init__(self, dtype=torch.int8) -> None:
        super().__init__(dtype)
        shown = self.qkv.held
        self.qkv.held = lambda target: "packed" if target == "qkv.weight" else shown(target)


class Shows(FakeEngine):
    """An engine whose kernels read rows as they come."""

    def __init__(self, dtype=torch.int8) -> None:
        super().__init__(dtype)
        for layer in self.layers:
            layer.homes = layer.live
            layer.move_in = lambda target, undo: False


@pytest.fixture(params=[FakeEngine, Packs, Shows])
def engine(request):
    return request.param(torch.int8)


@pytest.fixture
def deltas(engine):
    return Deltas(serving(engine))


@pytest.fixture
def sender(deltas):
    return Sender(deltas.manifest(), delta=True)


def test_twenty_bundles_in_a_row_are_twenty_whole_updates(engine, deltas, sender):
    """To the bit and to the digest; the first one is whole."""
    weights = NEW
    for seed in range(20):
        weights = moved(weights, seed)
        bundle = sender.bundle(without_head(weights))
        report = deltas.apply(bundle)

        assert serves(engine, fresh(weights, dtype=torch.int8))
        assert deltas.manifest().digest == bundle.header.digest
        other = serving(FakeEngine(torch.int8))
        assert report.digest == other.reload(without_head(weights)).digest
        assert report.version == seed + 1


def test_an_engine_that_shows_its_weights_takes_the_first_delta_without_a_whole_bundle():
    """It started on the checkpoint that the sender began with."""
    engine = FakeEngine(torch.int8)
    deltas = Deltas(serving(engine))
    sender = Sender(deltas.manifest(), delta=True)
    assert sender.bundle(without_head(OLD)).header.digest == deltas.manifest().digest

    deltas.apply(sender.bundle(without_head(moved(OLD, 1))))

    assert serves(engine, fresh(moved(OLD, 1), dtype=torch.int8))
    assert deltas.kept_bytes == 0


def test_an_engine_that_packs_them_asks_for_a_whole_bundle_first():
    engine = Packs()
    deltas = Deltas(serving(engine))
    sender = Sender(deltas.manifest(), delta=True)
    sender.bundle(without_head(OLD))

    with pytest.raises(StaleBase, match=r"2 of its tensors, first q\.weight.*whole bundle first"):
        deltas.apply(sender.bundle(without_head(moved(OLD, 1))))
    assert serves(engine, fresh(OLD, dtype=torch.int8))

    deltas.apply(sender.snapshot())
    assert deltas.kept_bytes == 6 * 4
    deltas.apply(sender.bundle(without_head(moved(OLD, 2))))
    assert serves(engine, fresh(moved(OLD, 2), dtype=torch.int8))


def bundles(sender, count):
    weights, found = NEW, []
    for seed in range(count):
        weights = moved(weights, seed)
        found.append(sender.bundle(without_head(weights)))
    return found


@pytest.mark.parametrize("order", [(0, 2), (0, 1, 1), (0, 1, 2, 1)], ids=str)
def test_a_bundle_that_was_skipped_or_comes_again_changes_nothing(engine, deltas, sender, order):
    *good, bad = (bundles(sender, 3)[at] for at in order)
    for bundle in good:
        deltas.apply(bundle)
    before = {name: tensor.clone() for name, tensor in engine.live.items()}
    served = deltas.manifest().digest

    with pytest.raises(StaleBase, match=rf"{bad.header.base}.*{served}"):
        deltas.apply(bad)

    assert serves(engine, before)
    assert deltas.manifest().digest == served


def test_a_whole_bundle_may_come_at_any_time(engine, deltas, sender):
    first, *_ = bundles(sender, 3)
    deltas.apply(first)
    snapshot = sender.snapshot()

    deltas.apply(snapshot)
    deltas.apply(snapshot)

    assert deltas.manifest().digest == snapshot.header.digest


@pytest.mark.parametrize("how", ["reload", "behind its back"])
def test_after_another_writer_a_delta_is_stale(engine, deltas, sender, how):
    first, second, _ = bundles(sender, 3)
    deltas.apply(first)
    if how == "reload":
        deltas._session.reload(without_head(OLD))
    else:
        engine.live["norm.weight"].data[0] += 1
    before = {name: tensor.clone() for name, tensor in engine.live.items()}

    with pytest.raises(StaleBase):
        deltas.apply(second)

    assert serves(engine, before)
    deltas.apply(sender.snapshot())


def spoilt(delta, part, change):
    """The same bundle with one tensor changed on its way."""
    return Delta(delta.header, delta.parts | {part: change(delta.parts[part].clone())})


def flip(tensor):
    tensor.view(torch.uint8).view(-1)[0] ^= 1
    return tensor


def test_flipped_values_are_found_by_the_digest_and_taken_back(engine, deltas, sender):
    first, second, _ = bundles(sender, 3)
    deltas.apply(first)
    before = {name: tensor.clone() for name, tensor in engine.live.items()}

    for part in second.parts:
        with pytest.raises((BrokenDelta, MisfitTensor)):
            deltas.apply(spoilt(second, part, flip))
        assert serves(engine, before)

    deltas.apply(second)
    assert deltas.manifest().digest == second.header.digest


@pytest.mark.parametrize("engine", [FakeEngine, Packs], indirect=True)
def test_a_layer_that_fails_takes_everything_back(engine, deltas, sender):
    """Once: what comes again goes through."""
    first, second, _ = bundles(sender, 3)
    deltas.apply(first)
    before = {name: tensor.clone() for name, tensor in engine.live.items()}
    engine.qkv.on_commit = lambda: next(breaking(error=RuntimeError("the device is lost")))

    with pytest.raises(RuntimeError, match="the device is lost"):
        deltas.apply(second)
    assert serves(engine, before)

    engine.qkv.on_commit = lambda: None
    deltas.apply(second)
    assert deltas.manifest().digest == second.header.digest


def test_a_file_that_is_no_bundle_changes_nothing(engine, deltas, tmp_path):
    (tmp_path / "1.safetensors").write_bytes(b"nothing")

    with pytest.raises(BrokenDelta):
        deltas.apply(tmp_path / "1.safetensors")

    assert serves(engine, fresh(OLD, dtype=torch.int8))
    assert not deltas._session.transactions.in_bracket


def test_only_the_layers_that_change_are_written(caplog):
    """And nobody warns that a bucket was lost."""
    engine = FakeEngine(torch.int8)
    deltas = Deltas(serving(engine))
    sender = Sender(deltas.manifest(), delta=True)
    sender.bundle(without_head(OLD))
    engine.qkv.on_commit = lambda: pytest.fail("q and k are as they were")

    with caplog.at_level(logging.WARNING):
        report = deltas.apply(
            sender.bundle(without_head(OLD) | {"norm.weight": OLD["norm.weight"] + 1})
        )

    assert len(report.layers) == 1
    assert not caplog.records


def test_where_kernels_read_rows_only_what_changed_is_written_and_kept_for_undo():
    engine = Shows()
    deltas = Deltas(serving(engine))
    sender = Sender(deltas.manifest(), delta=True)
    sender.bundle(without_head(OLD))
    engine.qkv.on_commit = lambda: pytest.fail("nothing is made anew")
    weights = {name: tensor.clone() for name, tensor in without_head(OLD).items()}
    weights["q.weight"][1, 2] = 0

    report = deltas.apply(sender.bundle(weights))

    assert serves(engine, fresh(weights, dtype=torch.int8))
    assert (len(report.layers), report.bytes_out, report.undo_bytes) == (1, 1, 1)
    assert report.version == 1


def test_what_was_overwritten_is_put_back_when_a_later_layer_fails():
    """A push fails after the windows of others were written."""
    engine = Shows()
    engine.norm.homes = {}
    deltas = Deltas(serving(engine))
    sender = Sender(deltas.manifest(), delta=True)
    deltas.apply(sender.bundle(without_head(NEW)))
    before = {name: tensor.clone() for name, tensor in engine.live.items()}
    engine.norm.on_commit = lambda: next(breaking(error=RuntimeError("the device is lost")))
    weights = {name: -tensor for name, tensor in without_head(NEW).items()}
    delta = sender.bundle(weights)

    with pytest.raises(RuntimeError, match="the device is lost"):
        deltas.apply(delta)
    assert serves(engine, before)

    engine.norm.on_commit = lambda: None
    deltas.apply(delta)
    assert serves(engine, fresh(weights, dtype=torch.int8))


def test_a_bundle_of_nothing_changes_nothing(engine, deltas, sender):
    first = sender.bundle(without_head(NEW))
    deltas.apply(first)

    report = deltas.apply(sender.bundle(without_head(NEW)))

    assert report.layers == ()
    assert deltas.manifest().digest == first.header.digest
    assert serves(engine, fresh(NEW, dtype=torch.int8))


def test_a_push_that_waits_is_dropped_by_a_bundle_as_by_any_bracket(engine, deltas, sender):
    session = deltas._session
    session.push([("q.weight", NEW["q.weight"])])
    with pytest.raises(IncompleteUpdate):
        session.check_nothing_waits()

    deltas.apply(sender.bundle(without_head(NEW)))

    session.check_nothing_waits()
    assert serves(engine, fresh(NEW, dtype=torch.int8))


def test_the_digest_of_the_report_is_that_of_what_is_live(engine, deltas, sender):
    """What the update has read of live memory stands for a second look only if nothing is written
    after it; written in place, pushed, and both in one bundle."""
    weights = NEW
    deltas.apply(sender.bundle(without_head(weights)))
    for names in (["norm.weight"], ["q.weight"], ["q.weight", "norm.weight"]):
        weights = weights | {name: moved(weights, 5)[name] for name in names}
        report = deltas.apply(sender.bundle(without_head(weights)))
        assert report.digest == deltas._session.proofs.digest()


def test_a_nan_among_the_codes_of_many_tensors_is_named():
    codes = torch.ones(3).to(torch.float8_e4m3fn)
    nan = torch.tensor([1, math.nan]).to(torch.float8_e4m3fn)
    gaps = torch.zeros(3, dtype=torch.uint8)
    changes = {name: Change("gaps", gaps, codes) for name in ("q", "v")}
    _check_finite(changes)

    with pytest.raises(MisfitTensor, match=r"^k\b"):
        _check_finite({"q": changes["q"], "k": Change("gaps", gaps[:2], nan), "v": changes["v"]})


def test_what_only_others_hold_is_theirs_and_of_an_engine_that_is_alone_there_is_none(
    engine, deltas
):
    """Here the loader drops `lm_head`: a bundle that holds one was made for another engine, or is
    one for several workers, of which another has it."""
    mine = deltas.manifest()
    theirs = {"lm_head.weight": TensorSpec(shape=(8, 4), dtype="bfloat16")}
    sender = Sender(mine.model_copy(update={"tensors": mine.tensors | theirs}), delta=True)
    bundle = sender.bundle(NEW)

    with pytest.raises(BrokenDelta, match=r"lm_head\.weight.*the engine wants none"):
        deltas.apply(bundle)
    assert serves(engine, fresh(OLD, dtype=torch.int8))
    engine.is_alone = False
    deltas.apply(bundle)
    assert serves(engine, fresh(NEW, dtype=torch.int8))

    said = dict(bundle.header.tensors)
    said["lm_head.weight"] = said["lm_head.weight"].model_copy(update={"fingerprint": "0" * 32})
    spoilt = Delta(bundle.header.model_copy(update={"tensors": said}), bundle.parts)
    with pytest.raises(BrokenDelta, match="some of its bytes are not those that were sent"):
        deltas.apply(spoilt)
