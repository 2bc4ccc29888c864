"""A layer that is written where it lies: what its undo log keeps, and who fills what where."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn

from flashquant.patches.layers import InPlaceLayer, LayerBlueprint
from flashquant.plan import View, Write
from flashquant.update import Reach, UndoLog

ROWS, COLUMNS, SHARDS = 2, 4, 3


def layer(**own: Tensor) -> InPlaceLayer:
    """One that holds these parameters."""
    module = nn.Module()
    for name, tensor in own.items():
        module.register_parameter(name, nn.Parameter(tensor, requires_grad=False))
    blueprint = LayerBlueprint(
        name="layer",
        module=module,
        attributes={},
        parameters={name: tensor.to("meta") for name, tensor in own.items()},
        targets={name: f"layer.{name}" for name in own},
    )
    return InPlaceLayer(blueprint, {f"layer.{name}": tensor for name, tensor in own.items()})


@pytest.fixture
def fused() -> InPlaceLayer:
    """Codes and scales of three shards."""
    return layer(
        weight=torch.zeros(SHARDS * ROWS, COLUMNS, dtype=torch.int8),
        weight_scale=torch.zeros(SHARDS * ROWS, 1),
    )


def shard(index: int, target: str = "layer.weight", columns: int = COLUMNS) -> Write:
    """The step of one shard."""
    source = View((ROWS, columns), (columns, 1), 0)
    return Write("shard", source, target, source._replace(offset=index * ROWS * columns))


def codes(value: int) -> Tensor:
    return torch.full((ROWS, COLUMNS), value, dtype=torch.int8)


def receive(layer: InPlaceLayer, index: int, undo: UndoLog, reach: Reach, columns: int = COLUMNS):
    target = "layer.weight" if columns > 1 else "layer.weight_scale"
    step = shard(index, target, columns)
    layer.receive(step, torch.full((ROWS, columns), index + 1), undo, reach, None)


def test_a_home_is_kept_once_however_many_shards_come(fused):
    undo, home = UndoLog(), fused.homes["layer.weight"]

    for index in range(SHARDS):
        receive(fused, index, undo, Reach.PARTS)
    assert home[:, 0].tolist() == [1, 1, 2, 2, 3, 3]
    assert undo.bytes == home.nbytes

    undo.restore()
    assert not home.any()


def test_every_update_keeps_its_own(fused):
    """The log of an update that is over must not stand for the next one's."""
    home = fused.homes["layer.weight"]
    failed, next_one = UndoLog(), UndoLog()
    receive(fused, 0, failed, Reach.PARTS)
    fused.stage("layer.weight").forget(shard(0).target_view)
    failed.restore()

    receive(fused, 1, next_one, Reach.PARTS)

    assert next_one.bytes == home.nbytes


def test_what_waits_in_a_stage_is_not_made_in_live_memory(fused):
    """A loader began it on staged memory, which would overwrite at the commit what is made live."""
    undo, home = UndoLog(), fused.homes["layer.weight"]
    receive(fused, 0, undo, Reach.NOTHING)  # as a step is that the engine's loader writes itself

    window = fused.window(shard(1), undo, Reach.PARTS)
    window.fill_(2)
    fused.stage("layer.weight").arrived(shard(1).target_view)
    receive(fused, 2, undo, Reach.PARTS)

    assert not home.any()
    assert not undo.touched
    for index in range(SHARDS):
        receive(fused, index, undo, Reach.PARTS, columns=1)
    fused.commit(undo)
    assert home[:, 0].tolist() == [1, 1, 2, 2, 3, 3]


def test_a_loader_that_goes_on_where_codes_are_made_is_taken_back_too(fused):
    undo, home = UndoLog(), fused.homes["layer.weight"]
    receive(fused, 0, undo, Reach.PARTS)

    fused.stage("layer.weight").memory(fused.device).fill_(9)  # all of it, as a loader may
    undo.restore()

    assert not home.any()


@pytest.mark.parametrize("reach", [Reach.NOTHING, Reach.WHOLE])
def test_a_part_waits_outside_a_bracket(fused, reach):
    receive(fused, 0, UndoLog(), reach)

    assert not fused.homes["layer.weight"].any()
    assert fused.missing == ("layer.weight", "layer.weight_scale")


def test_a_push_by_itself_fills_a_parameter_that_needs_no_other():
    norm = layer(norm=torch.zeros(4))
    step = Write("norm", View((4,), (1,), 0), "layer.norm", View((4,), (1,), 0))
    undo = UndoLog()

    norm.receive(step, torch.ones(4), undo, Reach.WHOLE, None)
    assert norm.homes["layer.norm"].tolist() == [1, 1, 1, 1]
    undo.restore()

    assert not norm.homes["layer.norm"].any()


def test_what_stands_in_its_home_already_is_not_copied(fused):
    undo = UndoLog()
    for index in range(SHARDS):
        receive(fused, index, undo, Reach.PARTS)
        receive(fused, index, undo, Reach.PARTS, columns=1)
    kept = undo.bytes

    assert fused.ready
    assert fused.commit(undo) == kept == sum(home.nbytes for home in fused.homes.values())
    assert undo.bytes == kept
    assert not fused.ready
