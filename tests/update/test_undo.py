"""The way back: old values, newest change undone first."""

from __future__ import annotations

import pytest
import torch

from flashquant.update import UndoLog


def test_a_tensor_written_twice_returns_to_its_first_value():
    undo, live = UndoLog(), torch.tensor([1, 2, 3])

    for value in (10, 20):
        undo.remember(live)
        live.fill_(value)
    undo.restore()

    assert live.tolist() == [1, 2, 3]


def test_actions_and_tensors_are_undone_newest_first():
    undo, seen, live = UndoLog(), [], torch.tensor([1])

    undo.remember_how(lambda: seen.append("first"))
    undo.remember(live)
    live.fill_(2)
    undo.remember_how(lambda: seen.append(f"last, while the tensor is {live.item()}"))
    undo.restore()

    assert seen == ["last, while the tensor is 2", "first"]
    assert live.item() == 1


def test_restoring_twice_is_restoring_once():
    undo, live = UndoLog(), torch.tensor([1])
    undo.remember(live)

    undo.restore()
    live.fill_(5)
    undo.restore()

    assert live.item() == 5


def test_a_tensor_is_restored_in_place():
    undo, live = UndoLog(), torch.arange(6.0).view(2, 3).t()
    address, stride = live.data_ptr(), live.stride()

    undo.remember(live)
    live.zero_()
    undo.restore()

    assert (live.data_ptr(), live.stride()) == (address, stride)
    assert torch.equal(live, torch.arange(6.0).view(2, 3).t())


def test_a_parameter_that_wants_gradients_can_be_restored():
    undo, live = UndoLog(), torch.nn.Parameter(torch.ones(2))

    undo.remember(live)
    live.data.zero_()
    undo.restore()

    assert live.tolist() == [1, 1]


def test_a_log_counts_the_bytes_it_keeps():
    undo = UndoLog()

    undo.remember(torch.zeros(3, 4, dtype=torch.int8))
    undo.remember(torch.zeros(2, dtype=torch.float32))

    assert undo.bytes == 12 + 8


def test_what_is_forgotten_stays_as_it_is():
    undo, live = UndoLog(), torch.tensor([1])
    undo.remember(live)
    live.fill_(2)

    undo.forget()
    undo.restore()

    assert live.item() == 2
    assert undo.bytes == 8  # what it took is told in the report


def test_an_untouched_log_can_always_restore():
    assert UndoLog().can_restore
    assert UndoLog(keep=False).can_restore


def test_a_log_that_keeps_can_restore_after_a_touch():
    undo = UndoLog()

    undo.remember(torch.zeros(1))

    assert undo.touched
    assert undo.can_restore


def test_a_log_that_keeps_nothing_says_so_once_a_tensor_is_touched():
    undo, live = UndoLog(keep=False), torch.tensor([1])

    undo.remember(live)
    live.fill_(2)
    undo.restore()

    assert not undo.can_restore
    assert live.item() == 2
    assert undo.bytes == 0


def test_a_log_that_keeps_nothing_says_so_once_an_action_is_taken():
    undo, seen = UndoLog(keep=False), []

    undo.remember_how(lambda: seen.append("undone"))
    undo.restore()

    assert not undo.can_restore
    assert seen == []


def test_an_action_on_staged_memory_takes_nothing_from_a_log_that_keeps_nothing():
    undo = UndoLog(keep=False)

    undo.remember_how(lambda: None, live=False)

    assert not undo.touched
    assert undo.can_restore


def test_an_action_on_staged_memory_is_undone_like_any_other():
    undo, seen = UndoLog(), []

    undo.remember_how(lambda: seen.append("undone"), live=False)
    undo.restore()

    assert seen == ["undone"]


def test_a_log_that_fails_half_way_goes_on_where_it_stopped():
    undo, live, once = UndoLog(), torch.tensor([1]), [OSError("driver")]
    undo.remember(live)

    def fail_once():
        if once:
            raise once.pop()

    undo.remember_how(fail_once)
    live.fill_(2)
    with pytest.raises(OSError, match="driver"):
        undo.restore()
    undo.restore()

    assert live.item() == 1
