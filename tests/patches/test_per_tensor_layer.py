"""A layer whose codes are made of whole parameters: where, and what an undo log keeps of it."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from flashquant.patches.layers import PerTensorLayer
from flashquant.plan import View, Write
from flashquant.schemes import fp8_tensor
from flashquant.update import Reach, UndoLog
from tests.support.modules import created

ROWS, COLUMNS = 4, 8
VALUES = torch.randn(ROWS, COLUMNS, generator=torch.Generator().manual_seed(0)).bfloat16()
CODES, SCALE = fp8_tensor(VALUES)


@pytest.fixture
def live() -> dict[str, Tensor]:
    codes, scale = fp8_tensor(torch.ones(ROWS, COLUMNS).bfloat16())
    return {
        "layer.weight": codes,
        "layer.weight_scale": scale,
        "layer.bias": torch.zeros(ROWS).bfloat16(),
    }


@pytest.fixture
def layer(live: dict[str, Tensor]) -> PerTensorLayer:
    blueprint = created(None, weight=torch.ones_like(VALUES), bias=torch.zeros(ROWS).bfloat16())
    return PerTensorLayer(blueprint, live, fp8_tensor)


def receive(layer: PerTensorLayer, undo: UndoLog, rows: slice = slice(0, ROWS)) -> None:
    values = VALUES[rows].contiguous()
    view = View(tuple(values.shape), (COLUMNS, 1), rows.start * COLUMNS)
    step = Write("weight", view._replace(offset=0), "layer.weight", view)
    layer.receive(step, values, undo, Reach.PARTS, None)


def held(live: dict[str, Tensor]) -> list[Tensor]:
    return [tensor.float().clone() for tensor in live.values()]


def test_nothing_is_live_before_all_of_a_parameter_is_there(layer, live):
    before = held(live)

    receive(layer, UndoLog(), slice(0, 2))

    assert layer.missing == ("layer.weight",)
    assert all(map(torch.equal, held(live), before))


@pytest.mark.parametrize("prepares", [False, True])
def test_codes_and_scale_are_those_of_the_whole_and_can_be_put_back(layer, live, prepares):
    before, undo = held(live), UndoLog()
    receive(layer, undo, slice(0, 2))
    receive(layer, undo, slice(2, ROWS))
    if prepares:
        layer.prepare(undo)
        assert all(map(torch.equal, held(live), before))
        assert torch.equal(layer.held("layer.weight").float(), CODES.float())

    layer.commit(undo)

    assert torch.equal(live["layer.weight"].view(torch.uint8), CODES.view(torch.uint8))
    assert torch.equal(live["layer.weight_scale"], SCALE)
    assert not layer.ready
    undo.restore()
    assert all(map(torch.equal, held(live), before))


def test_what_is_not_quantized_is_copied(layer, live):
    undo, view = UndoLog(), View((ROWS,), (1,), 0)
    bias = torch.ones(ROWS).bfloat16()
    layer.receive(Write("bias", view, "layer.bias", view), bias, undo, Reach.PARTS, None)

    assert layer.commit(undo) == bias.nbytes

    assert torch.equal(live["layer.bias"], bias)
    assert torch.equal(live["layer.weight"].float(), fp8_tensor(torch.ones(4, 8))[0].float())


def test_it_offers_no_memory_to_write_rows_into(layer):
    """What arrives is not in the dtype of what is live."""
    assert dict(layer.homes) == {}
    assert not layer.move_in("layer.weight", UndoLog())
