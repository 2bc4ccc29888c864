"""The scheduler hears of new weights, by whatever call they came.

What a stack pushes by RPC (its own worker methods included) passes
`EngineCore.collective_rpc`, in the process that holds the scheduler. So there, in
the same call and before the next step:

    new weights             what was made of the old ones is dropped (`derived`), requests in
                            flight are computed anew, and outputs carry the new version
    a bracket stays open    no token is scheduled until it is closed: a forward pass would meet
                            layers of two policies, and refuse. Whatever is aborted, paused, resumed
                            or asked for in the meantime; a step that only tells the workers which
                            requests are over may run. A bracket whose trainer is gone is rolled
                            back after FLASHQUANT_BRACKET_TIMEOUT
    an update begins        its undo log may lie in the KV cache, where that is known to be safe
                            (`lending`)
    the weights are torn    requests are refused until a complete update has healed them; a
                            forward pass would refuse too, but end the engine with it
"""

from __future__ import annotations

import contextlib
import logging
import threading
from collections.abc import Iterator, Sequence
from typing import Any

from vllm.v1.core.sched.interface import PauseState
from vllm.v1.engine import EngineCoreRequestType
from vllm.v1.engine.core import DPEngineCoreProc, EngineCoreProc
from vllm.v1.executor.uniproc_executor import UniProcExecutor
from vllm.v1.request import RequestStatus

from flashquant.errors import TornWeights
from flashquant.patches.channels import NOTED
from flashquant.patches.decided import asks_for_session, checks_of
from flashquant.patches.guard import vllm_is
from flashquant.patches.point import PatchPoint
from flashquant.patches.seams import derived, lending, worker
from flashquant.patches.seams.loading import Standing, find_session
from flashquant.patches.seams.logprobs import truncation_to_warn_of, warn_of_truncation

logger = logging.getLogger(__name__)

_HAS_VERSION = vllm_is(">=0.27")  # before, an engine core knows no version of its weights
_LOOK_EVERY = 1.0  # seconds
_AFTER = 0.05  # seconds, by which the clocks of workers may differ


class _Noted:
    """What one engine core knows of its workers' weights."""

    def __init__(self) -> None:
        self.version = 0
        self.drafts = 0  # the versions of its drafts, together
        self.in_bracket = False  # an update was begun, and not finished yet
        self.lent = False  # the workers have their KV caches, for its undo log
        self.torn = ""  # why nothing may be generated
        self.alarm: threading.Timer | None = None  # for an update that its trainer may have left
        self.rang = False
        self.warned = False  # of sampling that cuts tokens off


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
    if method in worker.UPDATES:
        _lend(core)
    try:
        result = original(core, method, timeout, args, kwargs)
    except BaseException:
        # A call may push much before it fails. Where the workers are gone, nothing is to be noted.
        with contextlib.suppress(RuntimeError):
            _take_note(core)
        raise
    _take_note(core)
    return result


def _init(original: Any, core: Any, vllm_config: Any, *args: Any, **kwargs: Any) -> None:
    original(core, vllm_config, *args, **kwargs)
    if asks_for_session(vllm_config) and not isinstance(core, EngineCoreProc):
        derived.warn(core)


def _run_busy_loop(original: Any, core: Any) -> None:
    """In a process of its own, plugins are loaded when the core is being made already."""
    if asks_for_session(core.vllm_config):
        derived.warn(core)
    original(core)


def _add_request(original: Any, core: Any, request: Any, request_wave: int = 0) -> None:
    torn = _noted(core).torn
    if not torn or not isinstance(core, EngineCoreProc):
        _look_at_sampling(core, request)
        original(core, request, request_wave)
        return
    logger.error("request %s is refused: %s", request.request_id, torn)
    core._send_error_outputs_to_client([request.request_id], request.client_index)


def _look_at_sampling(core: Any, request: Any) -> None:
    noted, model_config = _noted(core), core.vllm_config.model_config
    if noted.warned or not asks_for_session(core.vllm_config):
        return
    if cut := truncation_to_warn_of(request.sampling_params, model_config):
        noted.warned = True
        warn_of_truncation(cut, model_config)


def _add_request_here(original: Any, engine: Any, *args: Any, **kwargs: Any) -> Any:
    """In the caller's own process the refusal is an error, before vLLM has noted the request."""
    core = getattr(engine.engine_core, "engine_core", None)
    if core is not None and (torn := _noted(core).torn):
        raise TornWeights(torn)
    return original(engine, *args, **kwargs)


def _step(original: Any, core: Any) -> Any:
    """While an update is under way, no token is scheduled: by whatever call a step begins."""
    # In the caller's own process, waiting would be for ever: there a step refuses instead.
    if not _noted(core).in_bracket or not isinstance(core, EngineCoreProc):
        return _step_unheld(original, core)
    with _nothing_scheduled(core.scheduler):
        result = original(core)
        idle = not (core.scheduler.has_requests() or core.batch_queue)
    # Data-parallel ranks go on with dummy batches: the others may be in the middle of a step.
    if idle and not isinstance(core, DPEngineCoreProc):
        _wait_for_a_call(core.input_queue)
    return result


def _step_unheld(original: Any, core: Any) -> Any:
    """In the caller's own process, a step that meets an update under way is refused.

    Before anything is scheduled: what was would count as computed, also after a roll-back.
    """
    noted = _noted(core)
    meets = noted.in_bracket or noted.lent or _is_updated_in_another_thread(core)
    if meets and core.scheduler.has_unfinished_requests():
        lending.take_back(core)
        noted.lent = False
    return original(core)


def _is_updated_in_another_thread(core: Any) -> bool:
    """Whether the caller's process is in the middle of an update elsewhere."""
    here = not isinstance(core, EngineCoreProc) and isinstance(core.model_executor, UniProcExecutor)
    session = find_session(core.model_executor.driver_worker.get_model()) if here else None
    return session is not None and session.transactions.turn.elsewhere


@contextlib.contextmanager
def _nothing_scheduled(scheduler: Any) -> Iterator[None]:
    """The scheduler is paused, and whoever has paused it, or resumed it, does not notice."""
    # Not by `set_pause_state`, which tells the log each time.
    theirs, scheduler._pause_state = scheduler._pause_state, PauseState.PAUSED_ALL
    try:
        yield
    finally:
        scheduler._pause_state = theirs


def _wait_for_a_call(queue: Any) -> None:
    """Requests wait, but nothing can be done for them before the next call comes in."""
    with queue.not_empty:
        if not queue.queue:
            queue.not_empty.wait(_LOOK_EVERY)


def _handle_client_request(original: Any, core: Any, kind: Any, request: Any) -> None:
    noted = _noted(core)
    if noted.rang:
        noted.rang, noted.alarm = False, None
        _take_note(core)
    original(core, kind, request)


def _wake_up(original: Any, core: Any, tags: list[str] | None = None) -> Any:
    """Weights that were given up come back as anything: requests must not meet them."""
    result = original(core, tags)
    if asks_for_session(core.vllm_config):
        _take_note(core)
    return result


def _noted(core: Any) -> _Noted:
    noted: _Noted = NOTED.get(core) or NOTED.put(core, _Noted())
    return noted


def _lend(core: Any) -> None:
    noted = _noted(core)
    noted.lent = noted.lent or lending.lend(core)


def _take_note(core: Any) -> None:
    noted = _noted(core)
    answers = core.model_executor.collective_rpc(worker.STANDING)
    standings = [Standing(*answer) for answer in answers]
    version = max(standing.version for standing in standings)
    drafts = max(standing.drafts for standing in standings)
    half = derived.has_encoder(core) and any(standing.forgot for standing in standings)
    if (version, drafts) != (noted.version, noted.drafts) or half:
        derived.drop(core)
    if version != noted.version and _HAS_VERSION:
        core.set_weight_version(str(version))
    noted.version, noted.drafts = version, drafts
    noted.in_bracket = any(standing.holds_steps for standing in standings)
    if noted.in_bracket:
        _lend(core)
    else:
        noted.lent = False  # each worker has noticed, too
    if isinstance(core, EngineCoreProc):
        _set_alarm(
            core,
            noted,
            [s.quiet for s in standings if s.quiet is not None],
        )
    was_torn, noted.torn = noted.torn, next((s.torn for s in standings if s.torn), "")
    if noted.torn and not was_torn and isinstance(core, EngineCoreProc):
        _end_requests(core)


def _set_alarm(core: Any, noted: _Noted, quiet: Sequence[float]) -> None:
    """Look again when the trainer of an open bracket has been silent for too long.

    Each worker then finds by itself that it has, and rolls back.
    """
    limit = checks_of(core.vllm_config).bracket_timeout
    if not quiet or not limit:
        if noted.alarm is not None:
            noted.alarm.cancel()
            noted.alarm = None
    elif noted.alarm is None:

        def wake() -> None:
            noted.rang = True
            core.input_queue.put_nowait((EngineCoreRequestType.WAKEUP, None))

        noted.alarm = threading.Timer(limit - min(quiet) + _AFTER, wake)
        noted.alarm.daemon = True
        noted.alarm.start()


def _end_requests(core: Any) -> None:
    """What was in flight when the weights tore cannot go on."""
    for request in core.scheduler.finish_requests(None, RequestStatus.FINISHED_ERROR):
        core._send_error_outputs_to_client([request.request_id], request.client_index)


POINTS = (
    PatchPoint(
        "vllm.v1.engine.core:EngineCore.__init__",
        expects=("self", "vllm_config", ...),
        wrapper=_init,
    ),
    *(
        PatchPoint(
            f"vllm.v1.engine.core:{kind}.run_busy_loop", expects=("self",), wrapper=_run_busy_loop
        )
        for kind in ("EngineCoreProc", "DPEngineCoreProc")
    ),
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
    *(
        PatchPoint(f"vllm.v1.engine.core:EngineCore.{name}", expects=("self",), wrapper=_step)
        for name in ("step", "step_with_batch_queue")
    ),
    PatchPoint(
        "vllm.v1.engine.core:EngineCoreProc._handle_client_request",
        expects=("self", "request_type", "request"),
        wrapper=_handle_client_request,
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
