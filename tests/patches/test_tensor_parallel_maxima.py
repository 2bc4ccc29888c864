"""What a rank knows of the shards of the others, because it was sent whole tensors."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from flashquant.patches.layers.tensor_parallel_maxima import (
    Maxima,
    _amax_for_moe_weight_quant,
    _amax_for_tp_weight_quant,
    answered_by,
)
from flashquant.plan import Fill, View, Write
from flashquant.schemes.absmax import row_absmax
from flashquant.update import Stage, write

CPU = torch.device("cpu")
WHOLE = torch.tensor([[1.0, -8.0], [2.0, 3.0]])


def asked_the_others(amax: Tensor, is_sharded: bool) -> Tensor:
    raise AssertionError("asked the other ranks")


def first_column(maxima: Tensor | None) -> Stage:
    """Half of a tensor that row parallelism has cut."""
    stage = Stage(torch.Size((2, 1)), (1, 1), torch.float32)
    step = Write("o", View((2, 1), (2, 1), 0), "o", View((2, 1), (1, 1), 0))
    write(step, WHOLE, stage, CPU, maxima)
    return stage


def answer(stages: list[Stage], mine: Tensor) -> list[float]:
    with answered_by(Maxima(stages)):
        return _amax_for_tp_weight_quant(asked_the_others, mine, True).flatten().tolist()


def test_one_scale_for_the_layer_is_the_maximum_of_the_whole_tensor() -> None:
    assert answer([first_column(row_absmax(WHOLE))], torch.tensor([2.0])) == [8.0]


def test_a_scale_a_row_is_the_maximum_of_the_whole_row() -> None:
    mine = torch.tensor([[1.0], [2.0]], dtype=torch.bfloat16)

    assert answer([first_column(row_absmax(WHOLE))], mine) == [8.0, 3.0]


def test_padding_counts_for_what_it_is() -> None:
    stage = Stage(torch.Size((2, 2)), (2, 1), torch.float32)
    row = View((1, 2), (2, 1), 0)
    write(Write("q", row, "qkv", row), WHOLE, stage, CPU, row_absmax(WHOLE[1:]))
    write(Fill("qkv", View((1, 2), (2, 1), 2), 0.0), WHOLE, stage, CPU)

    assert answer([stage], torch.tensor([2.0])) == [3.0]


def test_a_maximum_comes_back_with_the_shard_it_belongs_to() -> None:
    """A push that fails brings other values, and takes them away again."""
    from flashquant.update import UndoLog

    stage, undo = first_column(row_absmax(WHOLE)), UndoLog()
    stage.remember(stage.windows, undo, values=True)
    step = Write("o", View((2, 1), (2, 1), 0), "o", View((2, 1), (1, 1), 0))
    write(step, WHOLE * 2, stage, CPU, row_absmax(WHOLE * 2))
    assert answer([stage], torch.tensor([2.0])) == [16.0]

    undo.restore()

    assert answer([stage], torch.tensor([2.0])) == [8.0]


def test_what_is_not_known_is_asked_for() -> None:
    with pytest.raises(AssertionError, match="asked the other ranks"):
        answer([first_column(None)], torch.tensor([2.0]))


def test_outside_an_update_nothing_is_answered() -> None:
    with pytest.raises(AssertionError, match="asked the other ranks"):
        _amax_for_tp_weight_quant(asked_the_others, torch.tensor([2.0]), True)


# Experts: gate and up, one row each of two columns, of which the other rank has a third.
def stacked(*whole: tuple[int, list[float]]) -> Stage:
    """`[2, 2, 2]` of what is sent row by row: to which row, and the whole of it."""
    stage = Stage(torch.Size((2, 2, 2)), (4, 2, 1), torch.float32)
    for row, values in whole:
        sent = torch.tensor([values])
        step = Write("e", View((1, 2), (3, 1), 0), "w13", View((1, 2), (2, 1), 2 * row))
        write(step, sent, stage, CPU, row_absmax(sent))
    return stage


GATE_AND_UP = ((0, [1.0, -2.0, 3.0]), (1, [1.0, 1.0, 1.0]), (2, [4.0, 0, -9]), (3, [5.0, 0, 0]))
OTHERS = ((0, [7.0, 1, 1]), (1, [0.5, 0, 70]), (2, [6.0, 1, 1]), (3, [0.25, 0, 60]))


def answer_of_experts(stages: list[Stage], mine: Tensor) -> list[float]:
    with answered_by(Maxima(stages)):
        return _amax_for_moe_weight_quant(asked_the_others, mine, 2).flatten().tolist()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_a_scale_an_expert_is_the_maximum_of_its_whole_tensors(dtype: torch.dtype) -> None:
    stages = [stacked(*OTHERS), stacked(*GATE_AND_UP)]

    assert answer_of_experts(stages, torch.tensor([2.0, 5.0], dtype=dtype)) == [3.0, 9.0]
    assert answer_of_experts(stages, torch.tensor([7.0, 6.0], dtype=dtype)) == [70.0, 60.0]


def test_a_scale_a_row_of_an_expert_is_the_maximum_of_the_whole_row() -> None:
    down = Stage(torch.Size((2, 2, 1)), (2, 1, 1), torch.float32)
    for expert, sent in enumerate((WHOLE, WHOLE * 2)):
        step = Write("e", View((2, 1), (2, 1), 0), "w2", View((2, 1), (1, 1), 2 * expert))
        write(step, sent, down, CPU, row_absmax(sent))
    mine = torch.tensor([[[1.0], [2.0]], [[2.0], [4.0]]])

    assert answer_of_experts([stacked(*OTHERS), down], mine) == [8.0, 3.0, 16.0, 6.0]


def test_experts_that_come_in_one_tensor_have_maxima_of_their_own() -> None:
    """Gate above up, of which this rank has two of three columns; and one tensor of the rest."""
    sent = torch.tensor([[row for _, row in GATE_AND_UP[at : at + 2]] for at in (0, 2)])
    both, halves = (Stage(torch.Size((2, 2, 2)), (4, 2, 1), torch.float32) for _ in range(2))
    whole = Write("e", View((2, 2, 2), (6, 3, 1), 0), "w13", View((2, 2, 2), (4, 2, 1), 0))
    write(whole, sent, both, CPU, row_absmax(sent))
    for row in (0, 1):  # vLLM's loader takes the gates of all experts, then what is beside them
        source, target = View((2, 1, 2), (6, 3, 1), 3 * row), View((2, 1, 2), (4, 2, 1), 2 * row)
        write(Write("e", source, "w13", target), sent, halves, CPU, row_absmax(sent))

    for stage in (both, halves):
        assert answer_of_experts([stacked(*OTHERS), stage], torch.tensor([2.0, 5.0])) == [3.0, 9.0]


def test_rows_of_experts_that_come_in_one_tensor_have_maxima_of_their_own() -> None:
    sent = torch.stack([WHOLE, WHOLE * 2])
    down = Stage(torch.Size((2, 2, 1)), (2, 1, 1), torch.float32)
    step = Write("e", View((2, 2, 1), (4, 2, 1), 0), "w2", View((2, 2, 1), (2, 1, 1), 0))
    write(step, sent, down, CPU, row_absmax(sent))
    mine = torch.tensor([[[1.0], [2.0]], [[2.0], [4.0]]])

    assert answer_of_experts([stacked(*OTHERS), down], mine) == [8.0, 3.0, 16.0, 6.0]


@pytest.mark.parametrize(
    "stages",
    [[stacked(*OTHERS)], [stacked(*GATE_AND_UP[:3])], [stacked(*GATE_AND_UP)] * 2],
    ids=["of another weight", "in part", "of either of two"],
)
def test_what_is_not_known_of_experts_is_asked_for(stages: list[Stage]) -> None:
    with pytest.raises(AssertionError, match="asked the other ranks"):
        answer_of_experts(stages, torch.tensor([2.0, 5.0]))


def test_experts_that_are_not_cut_up_are_nobody_elses_business() -> None:
    mine = torch.tensor([2.0, 5.0])

    with answered_by(Maxima([])):
        assert _amax_for_moe_weight_quant(lambda amax, size: amax + size, mine, 1)[0] == 3.0
