"""A layer that waits in checkpoint format: what is made of it, and fingerprinted, and put back."""

from __future__ import annotations

import contextlib

import pytest
import torch

from flashquant.patches.layers import ProcessedLayer, cpu, packed_digests
from flashquant.patches.layers.aliases import Alias
from flashquant.plan import View, Write
from flashquant.update import Reach, UndoLog, digests
from tests.support.modules import CPU, created, pack, process

FORM = View((2, 4), (4, 1), 0)


@pytest.fixture
def layer():
    blueprint = created(None, weight=torch.zeros(2, 4), other=torch.zeros(2, 4))
    module = blueprint.module
    loaded = digests(blueprint.loaded())
    alone = {f"layer.{name}": (value,) for name, value in module.named_parameters()}
    return ProcessedLayer([blueprint], loaded, alone, contextlib.nullcontext, CPU)


def fingerprints(layer):
    """Those of the layer's contents that stand for memory that cannot be read."""
    return {name: held for name, held in layer.contents() if isinstance(held, str)}


def test_what_shows_its_bytes_is_not_fingerprinted_to_prepare_it(layer, monkeypatch):
    """The digest reads it when it is live; a stage in bf16 is twice as large, or more."""
    undo, looked_at = UndoLog(), []
    monkeypatch.setattr(packed_digests, "digests", lambda items: looked_at.extend(items) or {})
    step = Write("weight", FORM, "layer.weight", FORM)
    layer.receive(step, torch.ones(2, 4), undo, Reach.NOTHING, None)

    layer.prepare(undo)
    written = layer.commit(undo)

    assert written == 32
    assert dict(layer.tensors())["layer.weight"].eq(1).all()
    assert looked_at == []


def test_of_memory_that_cannot_be_read_the_fingerprint_is_that_of_what_was_packed(
    layer, monkeypatch
):
    monkeypatch.setattr(packed_digests, "holds_handles", lambda _: True)
    undo, values = UndoLog(), torch.ones(2, 4)
    step = Write("weight", FORM, "layer.weight", FORM)
    layer.receive(step, values, undo, Reach.NOTHING, None)
    before = fingerprints(layer)

    layer.prepare(undo)
    assert fingerprints(layer) == before
    layer.commit(undo)

    assert fingerprints(layer) == before | {
        "layer.<packed>.weight": digests([("", values)])[""],
    }
    undo.restore()
    assert fingerprints(layer) == before


OLD, NEW = torch.rand(4, 8), torch.rand(4, 8)


def packed(by=pack, **options) -> ProcessedLayer:
    """One whose weight lies transposed, as it was loaded."""
    blueprint = created(by, weight=OLD.clone())
    loaded = digests(blueprint.loaded())
    arguments = ([process(blueprint)], loaded, {}, contextlib.nullcontext, CPU)
    return ProcessedLayer(*arguments, **options)


def receive_new(layer: ProcessedLayer, undo: UndoLog) -> None:
    form = View((4, 8), (8, 1), 0)
    layer.receive(Write("w", form, "layer.weight", form), NEW, undo, Reach.NOTHING, None)


@pytest.mark.parametrize("prepares", [False, True])
def test_what_processing_makes_goes_where_the_live_tensor_is_and_can_be_put_back(prepares):
    layer, undo = packed(), UndoLog()
    live = layer.blueprints[0].module.weight
    receive_new(layer, undo)
    if prepares:
        layer.prepare(undo)
        assert torch.equal(live, OLD.t())

    layer.commit(undo)

    assert dict(layer.tensors())["layer.weight"] is live
    assert torch.equal(live, NEW.t())
    undo.restore()
    assert torch.equal(live, OLD.t())


@pytest.mark.parametrize("prepares", [False, True])
def test_an_alias_is_brought_up_to_date_and_can_be_put_back(prepares):
    """As Mamba's mixer holds a view of its convolution's weight."""
    held = OLD[1:3].clone()
    layer = packed(aliases=[Alias(held, "layer.weight", View((2, 8), (8, 1), 8))])
    undo = UndoLog()
    receive_new(layer, undo)
    if prepares:
        layer.prepare(undo)

    layer.commit(undo)

    assert torch.equal(held, NEW[1:3])
    undo.restore()
    assert torch.equal(held, OLD[1:3])


def test_what_reads_its_scales_when_it_is_made_is_made_at_the_commit():
    """A handler for static activations: made earlier, it would read what is not live yet."""
    with_scales: list[bool] = []

    def read(layer) -> None:
        scales = cpu._scales.get()
        with_scales.append(scales is not None)
        if scales is not None:
            scales.refused = True
        pack(layer)

    layer, undo = packed(read), UndoLog()
    receive_new(layer, undo)
    layer.prepare(undo)
    assert layer.ready
    assert torch.equal(layer.held("layer.weight"), NEW)

    layer.commit(undo)

    assert with_scales[-2:] == [True, False]
    assert torch.equal(layer.blueprints[0].module.weight, NEW.t())
