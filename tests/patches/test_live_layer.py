"""A layer that is staged: what is looked at to prepare it."""

from __future__ import annotations

import contextlib

import pytest
import torch
from torch import nn

from flashquant.patches.layers import LayerBlueprint, LiveLayer
from flashquant.patches.layers import processed as layers
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
    return LiveLayer([blueprint], loaded, contextlib.nullcontext, torch.device("cpu"), {})


def test_what_shows_its_bytes_is_not_fingerprinted_to_prepare_it(layer, monkeypatch):
    """The digest reads it when it is live; a stage in bf16 is twice as large, or more."""
    undo, looked_at = UndoLog(), []
    monkeypatch.setattr(layers, "digests", lambda items: looked_at.extend(items) or {})
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
    monkeypatch.setattr(LiveLayer, "_is_packed", True)
    undo, values = UndoLog(), torch.ones(2, 4)
    step = Write("weight", FORM, "layer.weight", FORM)
    layer.receive(step, values, undo, Reach.NOTHING, None)
    before = dict(layer._digests)

    layer.prepare(undo)
    assert layer._digests == before
    layer.commit(undo)

    assert layer._digests == before | digests([("layer.weight", values)])
    undo.restore()
    assert layer._digests == before
