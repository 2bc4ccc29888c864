"""Who can be reloaded: an engine, a worker, or a model, told apart by what they can do."""

from __future__ import annotations

import asyncio
import inspect
import os
from collections.abc import Mapping, Sequence
from contextlib import ExitStack
from typing import Any

from pydantic import TypeAdapter
from torch import nn
from vllm.v1.executor.uniproc_executor import UniProcExecutor

from flashquant.errors import ReloadError
from flashquant.patches.engine import sharing_replicas
from flashquant.patches.remote import conversation as remote
from flashquant.patches.remote.carried import carried, saved
from flashquant.patches.seams import worker
from flashquant.patches.seams.loading import deltas_of, session_of
from flashquant.plan import Weights
from flashquant.sender import Delta, Manifest, TensorSpec
from flashquant.update import KVScales, ReloadReport, Status

_STATUS = TypeAdapter(Status)  # a worker's answer comes as plain data


def reload_weights(
    target: Any,
    weights: Weights,
    *,
    atomic: bool = True,
    strict: bool = True,
    prepare: bool = False,
    kv_scales: KVScales | None = None,
) -> Any:
    """What `flashquant.reload_weights` documents, for any target.

    Returns:
        A `ReloadReport`; for an `AsyncLLM`, an awaitable of one.

    Raises:
        ReloadError: and, with `atomic`, every live tensor is what it was.

    """
    scales = None if kv_scales is None else {name: tuple(p) for name, p in kv_scales.items()}
    options: dict[str, Any] = {
        "atomic": atomic,
        "strict": strict,
        "prepare": prepare,
        "kv_scales": scales,
    }
    if (model := _model_of(target)) is not None:
        return session_of(model).reload(weights, **options)
    if _is_async(target):
        return _reload_async(target, weights, **options)
    _check_llm(target)
    with remote.explaining_unpatched():
        if isinstance(_executor(target), UniProcExecutor):  # this process holds the (or a) worker
            (report,) = target.collective_rpc(worker.RELOAD, args=(weights,), kwargs=options)
        else:
            with carried(weights) as path:
                report = remote.carry_out(target, remote.conversation(path, **options))
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


def manifest(target: Any) -> Any:
    """What an engine, a worker or a model wants to be sent, and which policy it serves.

    Of several workers, one manifest: they want the same tensors, unsharded. Where each holds a
    shard, none can tell which policy that is, so there is no digest.

    Returns:
        A `Manifest`; for an `AsyncLLM`, an awaitable of one.

    Raises:
        ReloadError: flashquant does not look after this model, or the engine started without a
            checkpoint, or its replicas want different tensors.

    """
    if (model := _model_of(target)) is not None:
        return deltas_of(model).manifest()
    if _is_async(target):
        return _manifest_async(target)
    _check_llm(target)
    with remote.explaining_unpatched():
        return _one_manifest(target.collective_rpc(worker.MANIFEST))


async def _manifest_async(engine: Any) -> Manifest:
    with remote.explaining_unpatched():
        return _one_manifest(await remote.call(engine, worker.MANIFEST))


def _one_manifest(answers: Sequence[Mapping[str, Any]]) -> Manifest:
    every = [Manifest.model_validate(one) for one in remote.answers_of(answers)]
    first, tensors = every[0], dict[str, TensorSpec]()
    for one in every:  # of a pipeline, each stage has some
        clash = any(tensors.get(name, spec) != spec for name, spec in one.tensors.items())
        if clash or one.scheme != first.scheme:
            raise ReloadError(
                f"the replicas of this engine want different tensors ({first.scheme} and "
                f"{one.scheme}), so no one sender can serve them. Start them in one scheme, or "
                "push bf16."
            )
        tensors |= one.tensors
    same = all(one.digest == first.digest for one in every)
    return first.model_copy(update={"tensors": tensors, "digest": first.digest if same else None})


def apply_delta(target: Any, delta: Delta | str | os.PathLike[str]) -> Any:
    """Bring what changed into a serving engine: all of it, onto the policy it starts from.

    Args:
        target: a vLLM `LLM` or `AsyncLLM`, a worker, or the model inside one.
        delta: a bundle of a `flashquant.sender.Sender`, or the file that one was saved to. A whole
            one goes into any engine; where kernels pack weights, or workers hold shards, it also
            makes the engine keep on the host what it cannot read back (one byte a weight).

    Returns:
        A `ReloadReport`, whose digest is that of a reload of the same weights; for an
        `AsyncLLM`, an awaitable of one.

    Raises:
        StaleBase: it starts from another policy than is served: send `Sender.snapshot()`.
        BrokenDelta: it is cut, contradicts itself, or is for another engine.
        ReloadError: as `reload_weights`. Whichever it is, every live tensor is what it was.

    """
    if (model := _model_of(target)) is not None:
        return deltas_of(model).apply(delta)
    if _is_async(target):
        return _apply_async(target, delta)
    _check_llm(target)
    with remote.explaining_unpatched():
        if isinstance(_executor(target), UniProcExecutor):
            (report,) = target.collective_rpc(worker.APPLY_DELTA, args=(delta,))
        else:
            with saved(delta) as path:
                report = remote.carry_out(target, remote.delta_conversation(path))
    return report


async def _apply_async(engine: Any, delta: Delta | str | os.PathLike[str]) -> ReloadReport:
    with ExitStack() as stack:
        path = await asyncio.to_thread(stack.enter_context, saved(delta))
        stack.enter_context(remote.explaining_unpatched())
        together = sharing_replicas(engine.vllm_config) > 1
        talk = remote.delta_conversation(path, together=together)
        return await remote.carry_out_async(engine, talk)


async def _reload_async(engine: Any, weights: Weights, **options: Any) -> ReloadReport:
    with ExitStack() as stack:
        # Writing a model's tensors takes a while, in which the event loop serves others.
        path = await asyncio.to_thread(stack.enter_context, carried(weights))
        stack.enter_context(remote.explaining_unpatched())
        together = sharing_replicas(engine.vllm_config) > 1
        talk = remote.conversation(path, **options, together=together)
        return await remote.carry_out_async(engine, talk)


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
