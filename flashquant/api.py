"""What a trainer asks of a serving engine: to take weights, and how they stand.

    reload_weights     one update, in place, all or nothing
    apply_delta        the same, of what changed
    manifest           what a sender has to know
    status             version, digest, what is still pending
    kv_scales          of an fp8 KV cache, from the trainer's model

Importing this imports neither torch nor vLLM; both wait until something is asked for.
"""

from __future__ import annotations

import os
from collections.abc import Awaitable, Iterable, Mapping, Sequence
from typing import TYPE_CHECKING, Any, Protocol, overload

if TYPE_CHECKING:
    from torch import Tensor, nn

    from flashquant.plan import Weights
    from flashquant.sender import Delta, Manifest
    from flashquant.update import ReloadReport, Status


class _AsyncEngine(Protocol):
    """vLLM's `AsyncLLM`, as far as it is told apart from an `LLM`."""

    async def collective_rpc(self, method: str) -> list[Any]: ...


# An AsyncLLM is an object too; the first signature that fits is the one that holds.
@overload
def reload_weights(  # type: ignore[overload-overlap]
    target: _AsyncEngine,
    weights: Weights,
    *,
    atomic: bool = True,
    strict: bool = True,
    prepare: bool = False,
    kv_scales: Mapping[str, tuple[float, float]] | None = None,
) -> Awaitable[ReloadReport]: ...
@overload
def reload_weights(
    target: object,
    weights: Weights,
    *,
    atomic: bool = True,
    strict: bool = True,
    prepare: bool = False,
    kv_scales: Mapping[str, tuple[float, float]] | None = None,
) -> ReloadReport: ...
def reload_weights(
    target: Any,
    weights: Weights,
    *,
    atomic: bool = True,
    strict: bool = True,
    prepare: bool = False,
    kv_scales: Mapping[str, tuple[float, float]] | None = None,
) -> ReloadReport | Awaitable[ReloadReport]:
    """Bring one complete set of bf16 weights into a serving engine, in place.

    Each tensor is quantized into the memory that the running kernels read. Afterwards the engine
    is, bit for bit, what a fresh start on the same weights would be; no live tensor has moved, so
    compiled code and CUDA graphs stay valid. Requests in flight go on under the new weights: what
    the engine has cached of the old ones (prefixes, keys and values, embeddings of images) is
    computed anew.

    Args:
        target: a `vllm.LLM`, an `AsyncLLM` (await the result), a vLLM worker, or the model inside
            one. It must have been created while FLASHRL_CONFIG was set.
        weights: a dict of name to tensor, an iterable of `(name, tensor)` pairs, or a path
            (`str` or `PathLike`) to a `.safetensors` file or a folder of them (of a folder, what
            its index lists). Tensors are dense, whole (unsharded), with the names and shapes of
            the checkpoint; bfloat16, float16 or float32; on any device. A linear layer's is
            `[out_features, in_features]`. Marks of FSDP, DDP, `torch.compile` and merged PEFT in
            names are taken off. Each name comes once, in any order. A tied head may come beside
            its embeddings, if it equals them. An iterable is read once, a tensor at a time, and no
            reference to one is kept; for engines whose workers are other processes, all tensors
            are first written into files in /dev/shm (2 bytes a weight in bf16), a path is not.
        atomic: keep what it takes to put the old weights back. Costs a copy of what is
            overwritten (about 1 byte a quantized weight, 2 a bf16 one; `report.undo_bytes`): on a
            GPU in the KV cache, where it can lie there, else in host memory, which is kept for the
            next call until the engine sleeps (`FLASHQUANT_UNDO`).
            With False, that memory is saved, and a call that fails leaves the engine *torn*: it
            refuses every request with TornWeights until every parameter has arrived again.
        strict: every parameter that the engine's checkpoint filled must arrive. With False, what
            does not arrive stays as it is: whole layers, and of a fused layer (q, k and v; gate
            and up) the shards that were not sent, where their rows can be kept (`report.kept`).
            Where they cannot (packed for a kernel, or one scale for the whole layer) half a layer
            is refused. Costs nothing.
        prepare: make everything beside the live weights first, between steps of the engine,
            and pause it only to swap the new weights in. Costs memory for a second set of
            quantized weights on the engine's device (two sets, with `atomic`), and more time in
            all; `report.pause_seconds` is what requests see of it.
        kv_scales: of an engine whose KV cache is in fp8 (`kv_cache: fp8`): the scale of keys and
            that of values, finite and above 0, by attention layers of the checkpoint
            (`model.layers.0.self_attn`), as `kv_scales()` makes them. They go live with the
            weights, or not at all; layers that are not named keep theirs.

    Returns:
        A `ReloadReport`: `version`, `tensors`, `bytes_in` and `bytes_out`, `seconds` and `phases`
        (seconds), `digest` (of all live weights, the same as a fresh engine's), `pending`, `kept`,
        `ignored`, and what changed in the codes (`changed`, `clipped`). One line as `str()`. For an
        `AsyncLLM`, an awaitable of one. Data-parallel replicas are engines of their own: each
        commits by itself. Those that share experts commit together, or not at all.

    Raises:
        UnknownWeight: the engine's own loader knows no such name; says which one is near.
        MisfitTensor: wrong shape or dtype, a sharded, sparse or meta tensor, NaN or infinity,
            a value that the stored dtype cannot hold, a name that came twice, a tied head
            that differs from its embeddings, or a KV scale that is not finite and above 0.
        IncompleteUpdate: with `strict`, something did not arrive; without, half a layer did.
        PeerFailed: another worker refused the update; says which rank, and why.
        WorkerLost: a worker's process ended. vLLM's engine does not survive that: restart it.
        SleepingWeights: the engine sleeps; wake it up first.
        TornWeights: replicas that share experts are of two policies now: one failed when another
            had committed. Nothing is served until a complete update.
        MovedTensor: a live tensor is no longer where it was, because something outside flashquant
            replaced it. The engine refuses to serve: restart it.
        UnsupportedEngine: the loader of this model does more with a weight than flashquant can
            quantize in place; the model is served in bf16.
        ReloadError: all of the above but UnsupportedEngine are one (and StaleBase and BrokenDelta,
            of `apply_delta`). By itself: the target cannot be
            reloaded, or was created without FLASHRL_CONFIG; no safetensors at the path, or no pairs
            of name and tensor; the engine's loader refuses the tensor; another thread of this
            process is in the middle of an update of the engine.

        Whatever the iterable itself raises comes through as it is, and so does a lack of memory.
        Where it is awaited and cancelled, it is taken back, or it is too late: then it returns.
        With `atomic`, after every one of these but WorkerLost and MovedTensor, every live tensor is
        what it was, bit for bit, and the next update may follow at once.

    Example:
        >>> report = flashquant.reload_weights(llm, model.state_dict())
        >>> print(report)
        reload 1: 290 tensors, 988.1 MB in, 494.6 MB out, 24 layers in 412.3 ms (...)
        >>> report = await flashquant.reload_weights(async_llm, "runs/step-100", prepare=True)

    """
    from flashquant.patches.remote import target as targets

    report: ReloadReport = targets.reload_weights(
        target, weights, atomic=atomic, strict=strict, prepare=prepare, kv_scales=kv_scales
    )
    return report


def kv_scales(
    model: nn.Module, prompts: Iterable[Sequence[int] | Tensor]
) -> dict[str, tuple[float, float]]:
    """Compute the scales of an fp8 KV cache from the policy, to be sent with its weights.

    Runs the prompts through the model and looks at what each attention layer caches. Under its
    scale, the largest key (or value) that was seen fills a quarter to half of what e4m3 holds; of
    the scales that do, it is the one at which rounding moves keys (or values) least. It knows
    nothing of the engine, so all of its workers get the same.

    Args:
        model: of transformers, on any device, wrapped by FSDP or `torch.compile` or not; of FSDP,
            every rank calls it with the same prompts. It is put into evaluation mode meanwhile.
        prompts: token ids, `[length]` each, ideally with what the policy has answered to them; a
            handful, some hundred tokens in all, is enough.

    Returns:
        Of keys and of values, by attention layer (`model.layers.0.self_attn`), for the argument
        `kv_scales` of `reload_weights`. A layer that caches zeros alone has 1.0.

    Raises:
        ProfileError: keys or values are not finite; or nothing was cached: there was no prompt, a
            prompt was empty, or the model does not take transformers' cache. MLA is refused.

    Example:
        >>> scales = flashquant.kv_scales(policy, [prompt + answer for prompt, answer in batch[:8]])
        >>> flashquant.reload_weights(llm, policy.state_dict(), kv_scales=scales)

    """
    from flashquant.profiles import making

    return making.kv_scales(model, prompts)


@overload
def status(target: _AsyncEngine) -> Awaitable[Status]: ...  # type: ignore[overload-overlap]
@overload
def status(target: object) -> Status: ...
def status(target: Any) -> Status | Awaitable[Status]:
    """Tell how the weights of an engine, a worker or a model stand. Changes nothing.

    Reads every live weight once, for the digest: about the time of a copy of the quantized
    weights. Ask it after an update, not between tokens.

    Args:
        target: a `vllm.LLM`, an `AsyncLLM` (await the result), a vLLM worker, or the model inside
            one. It must have been created while FLASHRL_CONFIG was set.

    Returns:
        A `Status`: `scheme`, `version` (updates committed; 0 is the checkpoint), `digest` (hex; two
        engines with the same one hold the same weights), `pending` (layer -> parameters that have
        yet to arrive), `dropped` and `refused` (what a sync left out), `refusal` (the last error,
        also where a training stack swallowed it), `quiet` (seconds since anything came of an
        update that is still open), `torn`, `asleep`, `foreign` (weights that something outside
        flashquant has written), and how each layer is updated (`direct`, `staged`, `fallback`).
        One line as `str()`. For an `AsyncLLM`, an awaitable of one; of several workers, all in one.

    Raises:
        ReloadError: the target is none of these, or flashquant does not look after it:
            FLASHRL_CONFIG was not set when it was created, or not in its workers' processes.

    Example:
        >>> now = flashquant.status(llm)
        >>> now.version, now.pending, now.refusal
        (7, {}, None)
        >>> print(now)
        int8 at version 7: 24 direct, 2 staged, 0 fallback, digest 3f2a90c1d4e8

    """
    from flashquant.patches.remote import target as targets

    found: Status = targets.status(target)
    return found


@overload
def manifest(target: _AsyncEngine) -> Awaitable[Manifest]: ...  # type: ignore[overload-overlap]
@overload
def manifest(target: object) -> Manifest: ...
def manifest(target: Any) -> Manifest | Awaitable[Manifest]:
    """Say what an engine, a worker or a model wants to be sent, for a `flashquant.sender.Sender`.

    Names, shapes and dtypes of a complete update: codes and scales where the engine takes them,
    else floats.

    Args:
        target: as for `status`; the manifest of an `AsyncLLM` is awaited.

    Returns:
        A `flashquant.sender.Manifest`: its tensors, scheme, version, and the digest of the policy
        that is served. Plain data: `.model_dump_json()` travels.

    Raises:
        ReloadError: as `status`; or the engine is spread over pipeline stages.

    Example:
        >>> sender = Sender(flashquant.manifest(llm))
        >>> flashquant.reload_weights(llm, sender.stream(model.state_dict()))

    """
    from flashquant.patches.remote import target as targets

    found: Manifest = targets.manifest(target)
    return found


@overload
def apply_delta(  # type: ignore[overload-overlap]
    target: _AsyncEngine, delta: Delta | str | os.PathLike[str]
) -> Awaitable[ReloadReport]: ...
@overload
def apply_delta(target: object, delta: Delta | str | os.PathLike[str]) -> ReloadReport: ...
def apply_delta(
    target: Any, delta: Delta | str | os.PathLike[str]
) -> ReloadReport | Awaitable[ReloadReport]:
    """Bring what changed into a serving engine: onto the policy it starts from, or not at all.

    Args:
        target: as for `reload_weights`.
        delta: a bundle of a `flashquant.sender.Sender`, or the file that one was saved to.

    Returns:
        The `ReloadReport` of the update; for an `AsyncLLM`, an awaitable of one.

    Raises:
        StaleBase: the engine serves another policy than the one that the bundle starts from; says
            both digests. Send it a whole bundle (`sender.snapshot()`).
        BrokenDelta: the bundle was cut, contradicts itself, or is for another engine.
        ReloadError: as `reload_weights`. After each of these the old weights are served.

    Example:
        >>> flashquant.apply_delta(llm, sender.bundle(model.state_dict()))

    """
    from flashquant.patches.remote import target as targets

    report: ReloadReport = targets.apply_delta(target, delta)
    return report
