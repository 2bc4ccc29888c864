"""Who can be reloaded: an engine, a worker, or a model, told apart by what they can do."""

from __future__ import annotations

import asyncio
import inspect
import os
import tempfile
from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any

from pydantic import TypeAdapter
from safetensors.torch import save_file
from torch import Tensor, nn
from vllm.v1.executor.uniproc_executor import UniProcExecutor

from flashquant.errors import ReloadError
from flashquant.patches.remote import conversation as remote
from flashquant.patches.seams import worker
from flashquant.patches.seams.loading import session_of
from flashquant.plan import NamedTensors, Weights, named_tensors
from flashquant.update import ReloadReport, Status

_STATUS = TypeAdapter(Status)  # a worker's answer comes as plain data


def reload_weights(
    target: Any,
    weights: Weights,
    *,
    atomic: bool = True,
    strict: bool = True,
    prepare: bool = False,
) -> Any:
    """What `flashquant.reload_weights` documents, for any target.

    Returns:
        A `ReloadReport`; for an `AsyncLLM`, an awaitable of one.

    Raises:
        ReloadError: and, with `atomic`, every live tensor is what it was.

    """
    options = {"atomic": atomic, "strict": strict, "prepare": prepare}
    if (model := _model_of(target)) is not None:
        return session_of(model).reload(weights, **options)
    if _is_async(target):
        return _reload_async(target, weights, **options)
    _check_llm(target)
    with remote.explaining_unpatched():
        if isinstance(_executor(target), UniProcExecutor):  # this process holds the (or a) worker
            (report,) = target.collective_rpc(worker.RELOAD, args=(weights,), kwargs=options)
        else:
            with _stored(weights) as path:
                report = remote.reload(target, path, **options)
    return report


def status(target: Any) -> Any:
    """What `flashquant.status` documents, for any target.

    Returns:
        A `Status`; for an `AsyncLLM`, an awaitable of one.

    Raises:
        ReloadError: flashquant does not look after this model.

    """
    if (model := _model_of(target)) is not None:
        return session_of(model).status()
    if _is_async(target):
        return _status_async(target)
    _check_llm(target)
    with remote.explaining_unpatched():
        return _one_status(target.collective_rpc(worker.STATUS))


async def _reload_async(engine: Any, weights: Weights, **options: bool) -> ReloadReport:
    with ExitStack() as stack:
        # Writing a model's tensors takes a while, in which the event loop serves others.
        path = await asyncio.to_thread(stack.enter_context, _stored(weights))
        stack.enter_context(remote.explaining_unpatched())
        return await remote.reload_async(engine, path, **options)


async def _status_async(engine: Any) -> Status:
    with remote.explaining_unpatched():
        return _one_status(await remote.call(engine, worker.STATUS))


def _one_status(answers: Sequence[Mapping[str, Any]]) -> Status:
    return Status.of_workers([_STATUS.validate_python(answer) for answer in answers])


def _model_of(target: Any) -> nn.Module | None:
    """The model, where the target is one or holds one in this process."""
    if isinstance(target, nn.Module):
        return target
    return target.get_model() if hasattr(target, "get_model") else None


def _is_async(target: Any) -> bool:
    """Whether this is an `AsyncLLM`."""
    return inspect.iscoroutinefunction(getattr(target, "collective_rpc", None))


def _check_llm(target: Any) -> None:
    if not hasattr(target, "collective_rpc") or not hasattr(target, "llm_engine"):
        raise ReloadError(
            f"a {type(target).__name__} cannot be reloaded; pass a vllm.LLM, an AsyncLLM, a worker "
            "or a model"
        )


def _executor(llm: Any) -> object:
    return getattr(llm.llm_engine, "model_executor", None)


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
        save_file(_each_its_own(named_tensors(weights)), file)
        yield str(file)


def _each_its_own(weights: NamedTensors) -> dict[str, Tensor]:
    """By name, contiguous; safetensors takes no memory twice, as a tied head's and embeddings'."""
    found, seen = dict[str, Tensor](), set[int]()
    for name, tensor in weights:
        held = tensor.detach().contiguous()
        found[name] = held.clone() if held.data_ptr() in seen else held
        seen.add(held.data_ptr())
    return found


def _shared_memory() -> str | None:
    return "/dev/shm" if Path("/dev/shm").is_dir() else None
