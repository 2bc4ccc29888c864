"""The KV cache as memory of the undo log, as long as no step can run.

An update makes all keys and values stale, so its undo log may lie in their place. The engine core
lends that memory, for it alone knows what the scheduler believes:

    before       every running request is preempted and the prefix cache is reset, so nobody counts
                 on a key or value any more, whatever becomes of the update
    lent         to the worker's session, by an RPC. Workers answer in order and in one thread: a
                 step that was scheduled ahead has run when this one is answered, and they wait for
                 their device besides
    while lent   no step runs: the core is in the call that is the whole update, or holds its steps
                 until the bracket is closed; in the caller's own process, a step takes back what
                 was lent, or is refused
    given back   as zeros (`update/reserve.py`): kernels read past the end of a sequence, where
                 0 * NaN is NaN

Where any of this is not known to hold, nothing is lent, and the log lies on the host.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from typing import Any, Final

import torch
from torch import Tensor
from vllm.platforms import current_platform
from vllm.v1.executor.multiproc_executor import MultiprocExecutor
from vllm.v1.executor.uniproc_executor import UniProcExecutor
from vllm.v1.kv_cache_interface import (
    ChunkedLocalAttentionSpec,
    FullAttentionSpec,
    MLAAttentionSpec,
    SlidingWindowSpec,
    UniformTypeKVCacheSpecs,
)

from flashquant.config.env import Place
from flashquant.patches.channels import CACHE_AWAY
from flashquant.patches.decided import checks_of
from flashquant.patches.seams import ahead
from flashquant.patches.seams.loading import check_servable, find_session

LEND: Final = "flashquant_lend"
TAKE_BACK: Final = "flashquant_take_back"

# Keys and values of tokens, and nothing else: no states (Mamba), no encoder's, no constant sinks.
_OF_TOKENS: Final = (
    FullAttentionSpec,
    MLAAttentionSpec,
    SlidingWindowSpec,
    ChunkedLocalAttentionSpec,
)
_IN_ORDER: Final = (UniProcExecutor, MultiprocExecutor)  # how they call their workers


def lend(core: Any) -> bool:
    """Lend the workers their KV caches until the next update is over, if that is safe.

    Returns:
        Whether they have them.

    """
    if not _may_lend(core):
        return False
    try:
        if not ahead.preempt(core):
            return False
    except RuntimeError:  # requests hold blocks that cannot be taken from them
        return False
    core.model_executor.collective_rpc(LEND)
    return True


def take_back(core: Any) -> None:
    """The caller of an engine in its own process wants a step: lend no more.

    Raises:
        TornWeights: it cannot have one: layers serve two policies, or an undo log lies there.

    """
    core.model_executor.collective_rpc(TAKE_BACK)


def _may_lend(core: Any) -> bool:
    config = core.vllm_config
    return (
        _wanted(checks_of(config).undo)
        and config.kv_transfer_config is None  # others may be reading, or count on what they read
        and core.scheduler.get_kv_connector() is None
        and config.parallel_config.data_parallel_size == 1  # no dummy batches while steps are held
        and isinstance(core.model_executor, _IN_ORDER)
        and all(type(spec) in _OF_TOKENS for spec in _specs(core.scheduler.kv_cache_config))
    )


def _wanted(place: Place) -> bool:
    """On a CPU nothing is won but memory, and a refused update would cost requests in flight."""
    return place == "cache" or (place == "auto" and not current_platform.is_cpu())


def _specs(config: Any) -> Iterator[object]:
    for group in config.kv_cache_groups:
        spec = group.kv_cache_spec
        if isinstance(spec, UniformTypeKVCacheSpecs):
            yield from spec.kv_cache_specs.values()
        else:
            yield spec


def lend_here(worker: Any) -> None:
    """One worker's part of `lend`: its model's session has the memory from now on."""
    session = find_session(worker.get_model())
    if session is None or CACHE_AWAY.get(worker):
        return
    _wait_for_device()
    session.transactions.reserve.lent = tuple(_memory_of(worker.model_runner.kv_caches))


def take_back_here(worker: Any) -> None:
    """One worker's part of `take_back`."""
    check_servable(worker.get_model())
    end_loan(worker)


def end_loan(worker: Any) -> None:
    """Whatever was lent to a worker has been cleared, or was never used."""
    session = find_session(worker.get_model())
    if session is not None and session.transactions.reserve.lent:
        session.transactions.reserve.lent = ()
        _wait_for_device()


def _memory_of(caches: Iterable[Any]) -> Iterator[Tensor]:
    """All bytes of a runner's caches, each once: layers share allocations, and tensors."""
    storages = {
        cache.untyped_storage().data_ptr(): cache.untyped_storage()
        for cache in caches
        if isinstance(cache, Tensor)
    }
    for storage in storages.values():
        yield torch.empty(0, dtype=torch.uint8, device=storage.device).set_(storage)


def _wait_for_device() -> None:
    if torch.accelerator.is_available():
        torch.accelerator.synchronize()
