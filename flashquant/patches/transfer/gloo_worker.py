"""A worker's end of gloo: it receives each tensor that the trainer broadcasts over TCP.

A worker that refuses a tensor goes on receiving until the end of the update, so the
next one finds both sides in step.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from datetime import timedelta
from typing import Any

import torch
from torch import Tensor
from torch.distributed import TCPStore  # type: ignore[attr-defined]
from torch.distributed.distributed_c10d import BroadcastOptions, PrefixStore, ProcessGroupGloo
from vllm.distributed.weight_transfer.base import WeightTransferInitInfo, WeightTransferUpdateInfo

from flashquant.errors import ReloadError
from flashquant.patches.seams.loading import deltas_of
from flashquant.patches.transfer.bracketed import Bracketed, Load
from flashquant.sender import Delta

_PATIENCE = timedelta(minutes=5)


@dataclass
class Rendezvous(WeightTransferInitInfo):  # type: ignore[misc]
    """Where the trainer is, as a worker is told; `workers` are all ranks of all replicas."""

    host: str
    port: int
    workers: int


@dataclass
class Chunk(WeightTransferUpdateInfo):  # type: ignore[misc]
    """What will be broadcast, in this order.

    Attributes:
        names, dtypes, shapes: of the tensors.
        delta: the header, in JSON, of the bundle whose parts they are; empty for weights.

    """

    names: list[str]
    dtypes: list[str]
    shapes: list[list[int]]
    delta: str = ""


class GlooEngine(Bracketed):
    """A worker's end."""

    init_info_cls = Rendezvous
    update_info_cls = Chunk

    _group: ProcessGroupGloo | None = None

    def init_transfer_engine(self, init_info: Rendezvous) -> None:
        """Meet the trainer; blocks until everybody is there."""
        parallel = self.parallel_config
        own = parallel.data_parallel_index * parallel.world_size + parallel.rank
        self._group = meet(init_info.host, init_info.port, init_info.workers, 1 + own)

    def receive_weights(self, update_info: Chunk, load_weights: Load | None = None) -> None:
        """Load what is broadcast, one tensor at a time; or apply the bundle that it is.

        Raises:
            ReloadError: what `model.load_weights` refuses, after the rest was received; a bundle
                does not fit (`StaleBase`, `BrokenDelta`).

        """
        stream = self._received(update_info)
        try:
            if update_info.delta:
                deltas_of(self.model).take(Delta.of_parts(update_info.delta, dict(stream)))
            else:
                (load_weights or self.model.load_weights)(stream)
        finally:
            for _ in stream:  # the trainer goes on sending, whatever happened here
                pass

    def shutdown(self) -> None:
        self._group = None

    def _received(self, chunk: Chunk) -> _Stream:
        if self._group is None:
            raise ReloadError("init_weight_transfer_engine has not been called yet")
        return _Stream(self._group, chunk)


class _Stream:
    """The tensors of one chunk; unlike a generator, it survives its reader's failure."""

    def __init__(self, group: ProcessGroupGloo, chunk: Chunk) -> None:
        self._group = group
        self._forms = iter(list(zip(chunk.names, chunk.dtypes, chunk.shapes, strict=True)))

    def __iter__(self) -> Iterator[tuple[str, Tensor]]:
        return self

    def __next__(self) -> tuple[str, Tensor]:
        name, dtype, shape = next(self._forms)
        tensor = torch.empty(shape, dtype=_DTYPES[dtype], device="cpu")
        broadcast(self._group, tensor)
        return name, tensor


_DTYPES = {
    str(dtype): dtype
    for dtype in (
        torch.bfloat16,
        torch.float16,
        torch.float32,
        torch.int8,
        torch.uint8,
        torch.uint16,
        torch.uint32,
        torch.float8_e4m3fn,
    )
}


def meet(host: str, port: int, workers: int, rank: int) -> ProcessGroupGloo:
    """Wait for the trainer (rank 0) and every worker."""
    store = TCPStore(host, port, workers + 1, is_master=rank == 0, timeout=_PATIENCE)
    return ProcessGroupGloo(PrefixStore("flashquant", store), rank, workers + 1, _PATIENCE)


def broadcast(group: Any, tensor: Tensor) -> None:
    """From rank 0 to all the others; gloo knows bytes only, so every dtype goes as such."""
    options = BroadcastOptions()
    options.rootRank, options.rootTensor = 0, 0
    if tensor.numel():
        group.broadcast([tensor.view(-1).view(torch.uint8)], options).wait()
