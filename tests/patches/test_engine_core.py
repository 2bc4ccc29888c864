"""A step of the engine core in an open bracket, in whatever kind of core it begins."""

from __future__ import annotations

import queue
import time
from types import SimpleNamespace
from typing import Any
from unittest import mock

import pytest
from vllm.v1.core.sched.interface import PauseState
from vllm.v1.engine import EngineCoreRequestType
from vllm.v1.engine.core import DPEngineCoreProc, EngineCore, EngineCoreProc

from flashquant.errors import TornWeights
from flashquant.patches.seams import engine_core


class Scheduler:
    """As much of vLLM's as a step asks."""

    def __init__(self, *, finished: bool = False) -> None:
        self._pause_state = PauseState.UNPAUSED
        self.finished = finished

    def has_unfinished_requests(self) -> bool:
        return not self.finished

    def has_requests(self) -> bool:
        return self.finished or self._pause_state is not PauseState.PAUSED_ALL


def core_of(kind: type[EngineCore], *, in_bracket: bool, finished: bool = False) -> Any:
    core = object.__new__(kind)
    core.scheduler = Scheduler(finished=finished)
    core.batch_queue = None
    core.input_queue = queue.Queue()
    core._flashquant = engine_core._Noted()
    core._flashquant.in_bracket = in_bracket
    return core


def step(core: Any) -> tuple[PauseState, float]:
    """What a step found the scheduler in, and how long it took."""
    began = time.monotonic()
    found = engine_core._step(lambda core: core.scheduler._pause_state, core)
    return found, time.monotonic() - began


@pytest.fixture(autouse=True)
def patient(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(engine_core, "_LOOK_EVERY", 0.2)


@pytest.mark.parametrize("theirs", list(PauseState))
@pytest.mark.parametrize("kind", [EngineCoreProc, DPEngineCoreProc])
def test_nothing_is_scheduled_in_an_open_bracket_and_nobodys_pause_is_touched(
    kind: type[EngineCore], theirs: PauseState
) -> None:
    """Whoever has paused or resumed."""
    core = core_of(kind, in_bracket=True)
    core.scheduler._pause_state = theirs

    found, _ = step(core)

    assert found is PauseState.PAUSED_ALL
    assert core.scheduler._pause_state is theirs


@pytest.mark.parametrize("kind", [EngineCoreProc, DPEngineCoreProc])
def test_without_one_a_step_is_vllms_own(kind: type[EngineCore]) -> None:
    found, seconds = step(core_of(kind, in_bracket=False))

    assert found is PauseState.UNPAUSED
    assert seconds < 0.1


class Executor:
    """One whose worker answers `flashquant_take_back`, and refuses while an update is under way."""

    def __init__(self, *, refuses: bool) -> None:
        self.refuses, self.asked = refuses, list[str]()

    def collective_rpc(self, method: str) -> None:
        self.asked.append(method)
        if self.refuses:
            raise TornWeights("an update is under way")


def test_in_the_callers_own_process_a_step_is_refused_before_anything_is_scheduled() -> None:
    """Nobody could close the bracket while it waits."""
    core = core_of(EngineCore, in_bracket=True)
    core.model_executor = Executor(refuses=True)

    with pytest.raises(TornWeights):
        engine_core._step(mock.Mock(side_effect=AssertionError), core)


@pytest.mark.parametrize("in_bracket", [True, False])
def test_a_step_that_may_run_takes_back_what_was_lent(in_bracket: bool) -> None:
    core = core_of(EngineCore, in_bracket=in_bracket)
    core.model_executor = Executor(refuses=False)
    core._flashquant.lent = True

    found, _ = step(core)

    assert found is PauseState.UNPAUSED
    assert core.model_executor.asked == ["flashquant_take_back"]
    assert not core._flashquant.lent


def test_a_step_that_only_tells_which_requests_are_over_asks_nobody() -> None:
    core = core_of(EngineCore, in_bracket=True, finished=True)
    core.model_executor = Executor(refuses=True)

    assert step(core)[0] is PauseState.UNPAUSED


def test_requests_that_wait_cost_no_time_until_the_next_call() -> None:
    """A loop that finds work it may not do would spin."""
    core = core_of(EngineCoreProc, in_bracket=True)

    assert step(core)[1] >= 0.2
    core.input_queue.put((EngineCoreRequestType.WAKEUP, None))
    assert step(core)[1] < 0.1


def test_what_has_to_be_told_to_the_workers_is_told_at_once() -> None:
    """Which requests are over: by a step of no tokens, and by the next one."""
    assert step(core_of(EngineCoreProc, in_bracket=True, finished=True))[1] < 0.1


def test_data_parallel_ranks_go_on_with_dummy_batches() -> None:
    """The others may be in the middle of a step, and wait for this one."""
    assert step(core_of(DPEngineCoreProc, in_bracket=True))[1] < 0.1


def test_a_step_of_no_tokens_is_let_through_and_any_other_is_refused() -> None:
    """Nothing is computed in it."""
    from flashquant.patches.seams import reload

    def refuse() -> Any:
        raise TornWeights("the bracket is open")

    runner = SimpleNamespace(get_model=refuse)
    empty, full = (SimpleNamespace(total_num_scheduled_tokens=count) for count in (0, 3))

    assert reload._execute_model(lambda *_: "ran", runner, empty) == "ran"
    with pytest.raises(TornWeights):
        reload._execute_model(lambda *_: "ran", runner, full)
