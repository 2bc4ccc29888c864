"""One step into one storage, and how a stage knows that it is whole."""

from __future__ import annotations

from itertools import permutations

import pytest
import torch

from flashquant.plan import Fill, View, Write
from flashquant.update import Stage, UndoLog, write

CPU = torch.device("cpu")
ROWS = {"q": (0, 3), "k": (3, 2), "v": (5, 1)}


@pytest.fixture
def stage() -> Stage:
    return Stage(torch.Size((6, 4)), (4, 1), torch.bfloat16)


def step(name: str) -> Write:
    start, rows = ROWS[name]
    whole = View((rows, 4), (4, 1), 0)
    return Write(name, whole, "qkv", View((rows, 4), (4, 1), start * 4))


def shard(name: str) -> torch.Tensor:
    start, rows = ROWS[name]
    return torch.arange(start * 4, (start + rows) * 4, dtype=torch.bfloat16).view(rows, 4)


@pytest.mark.parametrize("order", list(permutations(ROWS)), ids="".join)
def test_shards_arrive_in_any_order(stage, order):
    for name in order:
        assert not stage.complete
        write(step(name), shard(name), stage, CPU)

    assert stage.complete
    assert torch.equal(stage.memory(CPU), torch.arange(24, dtype=torch.bfloat16).view(6, 4))


def test_a_shard_sent_again_is_not_counted_twice(stage):
    for _ in range(3):
        write(step("q"), shard("q"), stage, CPU)

    assert stage.started
    assert not stage.complete


def test_a_shard_sent_again_takes_the_place_of_the_first(stage):
    write(step("q"), shard("q"), stage, CPU)
    write(step("q"), shard("q") + 1, stage, CPU)

    assert torch.equal(stage.memory(CPU)[:3], shard("q") + 1)


def test_only_a_window_of_the_incoming_tensor_is_written(stage):
    columns = View((3, 4), (1, 3), 6)

    write(Write("q", columns, "qkv", View((3, 4), (4, 1), 0)), torch.arange(30.0), stage, CPU)

    assert torch.equal(stage.memory(CPU)[:3].float(), torch.arange(6.0, 18.0).view(4, 3).t())


def test_a_fill_counts_as_arrived(stage):
    write(Fill("qkv", View((6, 4), (4, 1), 0), 2.0), torch.empty(0), stage, CPU)

    assert stage.complete
    assert stage.memory(CPU).eq(2).all()


def test_an_incoming_buffer_may_be_reused_after_the_write(stage):
    bucket = shard("q")

    write(step("q"), bucket, stage, CPU)
    bucket.fill_(-1)

    assert torch.equal(stage.memory(CPU)[:3], shard("q"))


def test_a_stage_holds_nothing_before_the_first_shard(stage):
    assert stage.nbytes == 0
    assert not stage.started
    assert not stage.complete


def test_a_stage_takes_the_layout_it_was_asked_for():
    stage = Stage(torch.Size((6, 4)), (1, 6), torch.int8)

    memory = stage.memory(CPU)

    assert (memory.shape, memory.stride(), memory.dtype) == ((6, 4), (1, 6), torch.int8)
    assert stage.nbytes == 24


def test_a_forgotten_shard_must_be_sent_again(stage):
    for name in ROWS:
        write(step(name), shard(name), stage, CPU)

    stage.forget(step("k").target_view)

    assert not stage.complete
    write(step("k"), shard("k"), stage, CPU)
    assert stage.complete
    assert torch.equal(stage.memory(CPU), torch.arange(24, dtype=torch.bfloat16).view(6, 4))


def test_a_stage_that_forgets_its_last_shard_frees_its_memory(stage):
    write(step("q"), shard("q"), stage, CPU)

    stage.forget(step("q").target_view)

    assert stage.nbytes == 0
    assert not stage.started


def test_forgetting_what_never_came_changes_nothing(stage):
    write(step("q"), shard("q"), stage, CPU)

    stage.forget(step("k").target_view)

    assert stage.started
    assert torch.equal(stage.memory(CPU)[:3], shard("q"))


def test_an_adopted_memory_is_written_where_it_lies(stage):
    live = torch.zeros(6, 4, dtype=torch.bfloat16)

    stage.adopt(live)
    write(step("k"), shard("k"), stage, CPU)

    assert torch.equal(live[3:5], shard("k"))
    assert stage.memory(CPU) is live


def test_a_cleared_stage_starts_over_and_leaves_adopted_memory_alone(stage):
    live = torch.ones(6, 4, dtype=torch.bfloat16)
    stage.adopt(live)
    write(step("q"), shard("q"), stage, CPU)

    stage.clear()

    assert not stage.started
    assert stage.memory(CPU).data_ptr() != live.data_ptr()
    assert torch.equal(live[:3], shard("q"))


def test_a_zero_row_parameter_is_complete_from_the_start():
    assert Stage(torch.Size((0, 4)), (4, 1), torch.bfloat16).complete


def test_padding_is_not_waited_for_and_is_zero(stage):
    """As vLLM's own processing makes it; what is there by chance is not served."""
    fresh = stage.blank()
    fresh.expect(20)  # of 24

    for one in (fresh, fresh.blank()):
        write(step("q"), shard("q"), one, CPU)
        assert not one.complete
        write(step("k"), shard("k"), one, CPU)

        assert one.complete
        assert one.memory(CPU)[5].tolist() == [0, 0, 0, 0]
    assert not stage.blank().complete


def test_the_windows_of_a_stage_are_those_that_arrived(stage):
    for name in ("q", "v"):
        write(step(name), shard(name), stage, CPU)

    assert stage.windows == {step("q").target_view, step("v").target_view}


def test_a_remembered_shard_comes_back_with_its_values_after_it_was_overwritten(stage):
    undo = UndoLog()
    write(step("q"), shard("q"), stage, CPU)

    stage.remember({step("q").target_view}, undo, values=True)
    write(step("q"), shard("q") + 1, stage, CPU)
    undo.restore()

    assert torch.equal(stage.memory(CPU)[:3], shard("q"))


def test_a_remembered_shard_comes_back_after_it_was_forgotten(stage):
    undo = UndoLog()
    write(step("q"), shard("q"), stage, CPU)

    stage.remember({step("q").target_view}, undo, values=True)
    stage.forget(step("q").target_view)
    undo.restore()

    assert stage.windows == {step("q").target_view}
    assert torch.equal(stage.memory(CPU)[:3], shard("q"))


def test_remembered_windows_come_back_after_the_stage_was_cleared(stage):
    undo = UndoLog()
    for name in ROWS:
        write(step(name), shard(name), stage, CPU)

    stage.remember({step("q").target_view, step("v").target_view}, undo, values=False)
    stage.clear()
    undo.restore()

    assert stage.windows == {step("q").target_view, step("v").target_view}
    assert torch.equal(stage.memory(CPU)[:3], shard("q"))
    assert torch.equal(stage.memory(CPU)[5:], shard("v"))


def test_a_window_that_has_not_arrived_is_not_remembered(stage):
    undo = UndoLog()
    write(step("q"), shard("q"), stage, CPU)

    stage.remember({step("k").target_view}, undo, values=True)
    write(step("k"), shard("k"), stage, CPU)
    undo.restore()

    assert torch.equal(stage.memory(CPU)[3:5], shard("k"))


def test_remembering_staged_memory_does_not_touch_live_weights(stage):
    undo = UndoLog(keep=False)
    write(step("q"), shard("q"), stage, CPU)

    stage.remember({step("q").target_view}, undo, values=True)

    assert undo.can_restore
