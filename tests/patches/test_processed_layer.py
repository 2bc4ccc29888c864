"""A layer that waits in checkpoint format: what is fingerprinted to prepare it."""

from __future__ import annotations

import contextlib

import pytest
import torch
from torch import nn

from flashquant.patches.layers import LayerBlueprint, ProcessedLayer, packed_digests
from flashquant.plan import View, Write
from flashquant.update import Reach, UndoLog, digests

FORM = View((2, 4), (4, 1), 0)


@pytest.fixture
def layer():
    module = nn.Module()
    for name in ("weight", "other"):
        module.register_parameter(name, nn.Parameter(torch.zeros(2, 4), requires_grad=False))
    blueprint = LayerBlueprint(
        name="layer",
        module=module,
        attributes={},
        parameters={name: value.to("meta") for name, value in module.named_parameters()},
        targets={name: f"layer.{name}" for name in module._parameters},
    )
    loaded = digests(blueprint.loaded())
    alone = {f"layer.{name}": (value,) for name, value in module.named_parameters()}
    return ProcessedLayer([blueprint], loaded, alone, contextlib.nullcontext, torch.device("cpu"))


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
