"""Who can be reloaded: an `LLM`, a worker, or a model, told apart by what they can do."""

from __future__ import annotations

import logging
import os
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, cast

from safetensors.torch import save_file
from torch import nn

from flashquant.errors import ReloadError
from flashquant.patches import loading, remote, worker
from flashquant.patches.loading import session_of
from flashquant.report import ReloadReport, Status
from flashquant.weights import Weights, named_tensors

logger = logging.getLogger(__name__)


def reload_weights(
    target: Any, weights: Weights, *, atomic: bool = True, strict: bool = True
) -> ReloadReport:
    """Bring one complete set of bf16 weights into a serving engine, in place.

    Requests in flight go on under the new weights: what an `LLM` has cached of the
    old ones, their keys and values included, is computed anew. vLLM's outputs tell
    which tokens were sampled by which version (`CompletionOutput.weight_versions`).

    Args:
        target: a vLLM `LLM`, a worker, or the model inside one.
        weights: `(name, tensor)` pairs, a dict, or a path to safetensors; full,
            unsharded tensors under the names of the checkpoint, bf16, fp16 or fp32.
        atomic: keep an undo log in host memory (one byte a weight in 8 bit), so
            that a failure leaves the complete old weights. Without it, a failure
            leaves the engine torn: it refuses to generate until a complete reload.
        strict: every parameter must arrive. Without it, whole layers may keep
            their old weights; half a layer never goes live.

    Raises:
        ReloadError: and, with `atomic`, every live tensor is what it was.

    """
    if (model := _model_of(target)) is not None:
        loading.warn_of_cached_prefixes(model)
        return session_of(model).reload(weights, atomic=atomic, strict=strict)
    _check_llm(target)
    if _is_in_process(target):
        (report,) = target.collective_rpc(
            worker.RELOAD, args=(weights,), kwargs={"atomic": atomic, "strict": strict}
        )
    else:
        with _stored(weights) as path:
            report = remote.reload(target, path, atomic=atomic, strict=strict)
    # Cached keys and values belong to the old policy, those of requests in flight too:
    # vLLM computes them anew before the next token.
    if not target.reset_prefix_cache(reset_running_requests=True):
        logger.warning("vLLM did not reset its prefix cache; its log says why")
    # From here on, vLLM's outputs say which update sampled them.
    target.llm_engine.set_weight_version(str(report.version))
    return cast(ReloadReport, report)


def status(target: Any) -> Status:
    """How an `LLM`, a worker or a model stands: version, pending shards, digest, roads.

    Raises:
        ReloadError: flashquant does not look after this model.

    """
    if (model := _model_of(target)) is not None:
        return session_of(model).status()
    _check_llm(target)
    answers = target.collective_rpc(worker.STATUS)
    return Status.of_workers([Status(**answer) for answer in answers])


def _model_of(target: Any) -> nn.Module | None:
    """The model, where the target is one or holds one in this process."""
    if isinstance(target, nn.Module):
        return target
    return target.get_model() if hasattr(target, "get_model") else None


def _check_llm(target: Any) -> None:
    if not hasattr(target, "collective_rpc") or not hasattr(target, "llm_engine"):
        raise ReloadError(
            f"a {type(target).__name__} cannot be reloaded; pass a vllm.LLM, a worker or a model"
        )


def _is_in_process(llm: Any) -> bool:
    """Whether the one worker lives in this process, where tensors need no transport."""
    executor = getattr(llm.llm_engine, "model_executor", None)
    return (
        hasattr(executor, "driver_worker")
        and llm.llm_engine.vllm_config.parallel_config.world_size == 1
    )


@contextmanager
def _stored(weights: Weights) -> Iterator[str]:
    """The weights as a path that workers in other processes can read, as long as the call lasts.

    Tensors go through a safetensors file in shared memory, or where the system
    keeps temporary files.
    """
    if isinstance(weights, str | os.PathLike):
        yield str(Path(weights).resolve())
        return
    with tempfile.TemporaryDirectory(prefix="flashquant-", dir=_shared_memory()) as folder:
        file = Path(folder) / "weights.safetensors"
        save_file({name: tensor.contiguous() for name, tensor in named_tensors(weights)}, file)
        yield str(file)


def _shared_memory() -> str | None:
    return "/dev/shm" if Path("/dev/shm").is_dir() else None
