"""vLLM's own reload becomes one bracket of a session, whoever begins and ends it.

reload_weights, by path or by iterator          one call
start / update / finish_weight_update           through a transfer engine
initialize / finalize_layerwise_reload          by hand, as SkyRL and prime-rl do

Everything in them is vLLM's (finding the files, naming the tensors, moving them)
except the two calls that would take the live layers apart; between those they call
`model.load_weights`, which is flashquant's.
"""

from __future__ import annotations

import logging
import weakref
from typing import Any

from torch import nn

from flashquant.errors import ReloadError
from flashquant.patches.channels import STARTED
from flashquant.patches.guard import vllm_is
from flashquant.patches.point import PatchPoint
from flashquant.patches.seams.loading import check_servable, find_session, note_forgotten
from flashquant.update import Session

logger = logging.getLogger(__name__)


def _initialize(original: Any, model: nn.Module) -> None:
    session = find_session(model)
    if session is None:
        original(model)
    else:
        session.begin()


def _finalize(original: Any, *args: Any, **kwargs: Any) -> None:
    session = find_session(args[0] if args else kwargs["model"])
    if session is None:
        original(*args, **kwargs)
    else:
        session.finish()


def _reload_weights(
    original: Any,
    runner: Any,
    weights_iterator: Any = None,
    weights_path: str | None = None,
    is_checkpoint_format: bool = True,
) -> None:
    session = find_session(runner.get_model())
    if session is not None and not is_checkpoint_format:
        raise ReloadError(
            "reload_weights(is_checkpoint_format=False) copies into the kernels' own memory, where "
            "nothing can be checked or undone. Push the tensors under their checkpoint names, in "
            "bf16 or as the checkpoint stores them."
        )
    try:
        original(
            runner,
            weights_iterator=weights_iterator,
            weights_path=weights_path,
            is_checkpoint_format=is_checkpoint_format,
        )
    finally:
        if session is not None:
            session.abandon()


def _start_weight_update(original: Any, worker: Any, *args: Any, **kwargs: Any) -> None:
    """An update that its trainer never finished is over when the next one begins; vLLM would
    refuse, for ever."""
    session = _session_of_update(worker)
    if session is not None and worker._weight_update_active:
        logger.warning("a weight update was started and never finished; a new one begins instead")
        session.abandon()
        _end_weight_update(worker)
    STARTED.take(worker)
    original(worker, *args, **kwargs)
    session = _session_of_update(worker)
    if session is not None and session.transactions.current is not None:
        STARTED.put(worker, weakref.ref(session.transactions.current))


def _update_weights(original: Any, worker: Any, update_info: Any) -> None:
    """A chunk that fails, even before it reached the model, ends the update: vLLM says so too."""
    session = _session_of_update(worker)
    _check_started(worker, session)
    try:
        original(worker, update_info)
    except BaseException:
        STARTED.take(worker)
        if session is not None:
            session.abandon()
        raise


def _finish_weight_update(original: Any, worker: Any) -> None:
    """An update whose end was refused is over; vLLM would wait for its end for ever."""
    session = _session_of_update(worker)
    _check_started(worker, session)
    STARTED.take(worker)
    try:
        original(worker)
    except BaseException:
        if session is not None:
            _end_weight_update(worker)
        raise


def _check_started(worker: Any, session: Session | None) -> None:
    """Raise ReloadError where another update has come since this one was started."""
    started = STARTED.get(worker)
    if session is None or started is None:
        return
    try:
        session.transactions.check_current(started())
    except ReloadError:
        STARTED.take(worker)
        _end_weight_update(worker)
        raise


def _end_weight_update(worker: Any) -> None:
    """vLLM waits for no end of it any more."""
    worker._weight_update_active = False
    if _HAS_TARGETS:
        worker.weight_transfer_engine.reset_weight_update_target()


def _session_of_update(worker: Any) -> Session | None:
    """That of the model which this update is for: the target, or a speculative draft."""
    engine = worker.weight_transfer_engine
    return None if engine is None else find_session(engine.model)


def _execute_model(
    original: Any,
    runner: Any,
    scheduler_output: Any,
    intermediate_tensors: Any = None,
    dummy_run: bool = False,
    **kwargs: Any,
) -> Any:
    """Refuse to compute tokens for a client from a mixture of two policies.

    A step without tokens runs no model: it tells the worker which requests have ended. A dummy
    batch keeps a rank in step with the others, which wait for it in their collectives, whatever
    its weights are; what it computes is thrown away.
    """
    if scheduler_output.total_num_scheduled_tokens and not dummy_run:
        check_servable(runner.get_model())
    kwargs |= {"dummy_run": True} if dummy_run else {}  # the first runner has no such argument
    return original(runner, scheduler_output, intermediate_tensors, **kwargs)


def _reset_encoder_cache(original: Any, runner: Any) -> None:
    """Empty the worker's half of the encoder cache, and let the engine core know.

    By itself, as vLLM's own reload does it, that leaves the scheduler to believe in what is gone,
    which ends the engine.
    """
    original(runner)
    note_forgotten(runner)


_HAS_TARGETS = vllm_is(">=0.26")  # a draft can be updated by a transfer engine since then
_RELOAD = "vllm.model_executor.model_loader.reload"
_V1 = "vllm.v1.worker.gpu_model_runner"
_V2 = "vllm.v1.worker.gpu.model_runner"
# Where the two names stand, and in which versions. vLLM's transfer engines and some stacks
# import them from the package or from their own module; vLLM's reload has them by value, and
# was the first runner's own before it had a file.
_BRACKETS = {_RELOAD: "", f"{_RELOAD}.layerwise": "", _V1: "<0.32", f"{_RELOAD}.inplace": ">=0.32"}

POINTS = (
    *(
        point
        for module, versions in _BRACKETS.items()
        for point in (
            PatchPoint(
                f"{module}:initialize_layerwise_reload",
                expects=("model",),
                wrapper=_initialize,
                within=versions,
            ),
            PatchPoint(
                f"{module}:finalize_layerwise_reload",
                expects=("args", "kwargs"),
                wrapper=_finalize,
                within=versions,
            ),
        )
    ),
    PatchPoint(
        f"{_V1}:GPUModelRunner.reload_weights",
        expects=("self", "weights_iterator", "weights_path", "is_checkpoint_format"),
        wrapper=_reload_weights,
    ),
    # Before 0.32, this runner hands its arguments on to the other one's method.
    PatchPoint(
        f"{_V2}:GPUModelRunner.reload_weights", expects=("self", ...), wrapper=_reload_weights
    ),
    *(
        PatchPoint(
            f"vllm.v1.worker.gpu_worker:Worker.{name}",
            expects=("self", ...),
            wrapper=_start_weight_update,
            within=versions,
        )
        for name, versions in {
            "start_weight_update": "",
            "start_draft_weight_update": ">=0.26",
        }.items()
    ),
    PatchPoint(
        "vllm.v1.worker.gpu_worker:Worker.update_weights",
        expects=("self", "update_info"),
        wrapper=_update_weights,
    ),
    PatchPoint(
        "vllm.v1.worker.gpu_worker:Worker.finish_weight_update",
        expects=("self",),
        wrapper=_finish_weight_update,
    ),
    PatchPoint(
        f"{_V1}:GPUModelRunner.execute_model",
        expects=("self", "scheduler_output", "intermediate_tensors"),
        wrapper=_execute_model,
    ),
    PatchPoint(
        f"{_V2}:GPUModelRunner.execute_model",
        expects=("self", "scheduler_output", "intermediate_tensors", "dummy_run", ...),
        wrapper=_execute_model,
    ),
    *(
        PatchPoint(
            f"{module}:GPUModelRunner.reset_encoder_cache",
            expects=("self",),
            wrapper=_reset_encoder_cache,
        )
        for module in (_V1, _V2)
    ),
)
