"""The scheduler hears of new weights, by whatever call they came.

What a stack pushes by RPC (its own worker methods included) passes
`EngineCore.collective_rpc`, in the process that holds the scheduler. So there, in
the same call and before the next step:

    new weights             keys and values of the old ones are dropped, those of requests in
                            flight are computed anew, and outputs carry the new version
    a bracket stays open    no step runs until it is closed: a forward pass would meet
                            layers of two policies, and refuse; whoever pauses or resumes in the
                            meantime has their way when it is closed
    the weights are torn    requests are refused until a complete update has healed them; a
                            forward pass would refuse too, but end the engine with it
"""

from __future__ import annotations

import contextlib
import logging
from typing import Any

from vllm.v1.core.sched.interface import PauseState
from vllm.v1.engine.core import DPEngineCoreProc, EngineCoreProc
from vllm.v1.request import RequestStatus

from flashquant.errors import TornWeights
from flashquant.patches import worker
from flashquant.patches.engine import asks_for_session
from flashquant.patches.guard import vllm_is
from flashquant.patches.loading import Standing
from flashquant.patches.point import PatchPoint

logger = logging.getLogger(__name__)

_HAS_VERSION = vllm_is(">=0.27")  # before, an engine core knows no version of its weights


class _Noted:
    """What one engine core knows of its workers' weights."""

    def __init__(self) -> None:
        self.version = 0
        self.in_bracket = False  # an update was begun, and not finished yet
        self.paused = False  # by us, for that
        self.torn = ""  # why nothing may be generated


def _collective_rpc(
    original: Any,
    core: Any,
    method: Any,
    timeout: float | None = None,
    args: tuple[Any, ...] = (),
    kwargs: dict[str, Any] | None = None,
) -> Any:
    if not asks_for_session(core.vllm_config):
        return original(core, method, timeout, args, kwargs)
    try:
        result = original(core, method, timeout, args, kwargs)
    except BaseException:
        # A call may push much before it fails. Where the workers are gone, nothing is to be noted.
        with contextlib.suppress(RuntimeError):
            _take_note(core)
        raise
    _take_note(core)
    return result


def _add_request(original: Any, core: Any, request: Any, request_wave: int = 0) -> None:
    torn = _noted(core).torn
    if not torn or not isinstance(core, EngineCoreProc):
        original(core, request, request_wave)
        return
    logger.error("request %s is refused: %s", request.request_id, torn)
    core._send_error_outputs_to_client([request.request_id], request.client_index)


def _add_request_here(original: Any, engine: Any, *args: Any, **kwargs: Any) -> Any:
    """In the caller's own process the refusal is an error, before vLLM has noted the request."""
    core = getattr(engine.engine_core, "engine_core", None)
    if core is not None and (torn := _noted(core).torn):
        raise TornWeights(torn)
    return original(engine, *args, **kwargs)


def _pause_scheduler(original: Any, core: Any, *args: Any, **kwargs: Any) -> Any:
    """Somebody else pauses, and will resume: closing the bracket must not."""
    _noted(core).paused = False
    return original(core, *args, **kwargs)


def _resume_scheduler(original: Any, core: Any) -> Any:
    """Somebody else resumes while a bracket is open: steps begin when it is closed."""
    noted = _noted(core)
    if not noted.in_bracket or not isinstance(core, EngineCoreProc):
        return original(core)
    core.scheduler.set_pause_state(PauseState.PAUSED_ALL)
    noted.paused = True
    logger.info("an update is under way; the engine resumes when it has been finished")
    return None


def _wake_up(original: Any, core: Any, tags: list[str] | None = None) -> Any:
    """Weights that were given up come back as anything: requests must not meet them."""
    result = original(core, tags)
    if asks_for_session(core.vllm_config):
        _take_note(core)
    return result


def _noted(core: Any) -> _Noted:
    noted: _Noted = vars(core).setdefault("_flashquant", _Noted())
    return noted


def _take_note(core: Any) -> None:
    noted = _noted(core)
    answers = core.model_executor.collective_rpc(worker.STANDING)
    standings = [Standing(*answer) for answer in answers]
    version = max(standing.version for standing in standings)
    if version != noted.version:
        noted.version = version
        if not core.reset_prefix_cache(reset_running_requests=True):
            logger.warning("vLLM did not reset its prefix cache; its log says why")
        if _HAS_VERSION:
            core.set_weight_version(str(version))
    # In the caller's own process, waiting would be for ever: there a step refuses instead.
    if isinstance(core, EngineCoreProc) and not isinstance(core, DPEngineCoreProc):
        _hold_steps(core, noted, any(standing.holds_steps for standing in standings))
    was_torn, noted.torn = noted.torn, next((s.torn for s in standings if s.torn), "")
    if noted.torn and not was_torn and isinstance(core, EngineCoreProc):
        _end_requests(core)


def _hold_steps(core: Any, noted: _Noted, under_way: bool) -> None:
    """Pause the scheduler while an update is under way, unless somebody else has."""
    noted.in_bracket = under_way
    if under_way and not noted.paused and not core.is_scheduler_paused():
        core.scheduler.set_pause_state(PauseState.PAUSED_ALL)
        noted.paused = True
    elif noted.paused and not under_way:
        core.scheduler.set_pause_state(PauseState.UNPAUSED)
        noted.paused = False


def _end_requests(core: Any) -> None:
    """What was in flight when the weights tore cannot go on."""
    for request in core.scheduler.finish_requests(None, RequestStatus.FINISHED_ERROR):
        core._send_error_outputs_to_client([request.request_id], request.client_index)


POINTS = (
    PatchPoint(
        "vllm.v1.engine.core:EngineCore.collective_rpc",
        expects=("self", "method", "timeout", "args", "kwargs"),
        wrapper=_collective_rpc,
    ),
    PatchPoint(
        "vllm.v1.engine.core:EngineCore.add_request",
        expects=("self", "request", "request_wave"),
        wrapper=_add_request,
    ),
    PatchPoint(
        "vllm.v1.engine.core:EngineCoreProc.pause_scheduler",
        expects=("self", "mode", "clear_cache"),
        wrapper=_pause_scheduler,
    ),
    PatchPoint(
        "vllm.v1.engine.core:EngineCore.resume_scheduler",
        expects=("self",),
        wrapper=_resume_scheduler,
    ),
    PatchPoint(
        "vllm.v1.engine.core:EngineCore.wake_up",
        expects=("self", "tags"),
        wrapper=_wake_up,
    ),
    PatchPoint(
        "vllm.v1.engine.llm_engine:LLMEngine.add_request",
        expects=("self", "request_id", "prompt", "params", ...),
        wrapper=_add_request_here,
    ),
)
