"""Weights by gloo: the trainer broadcasts each tensor over TCP, every worker receives it.

    trainer = WeightTransferTrainerFactory.trainer_init(
        GlooRendezvous(host="10.0.0.1", port=29700, workers=2, rank=0),
        client=HTTPVLLMWeightSyncClient("http://10.0.0.2:8000"),
        source=ModuleSource(model),
    )
    trainer.send_weights()                       once a step

A worker that refuses a tensor goes on receiving until the end of the update, so the
next one finds both sides in step.
"""

from __future__ import annotations

from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass
from datetime import timedelta
from typing import Any, ClassVar

import torch
from torch import Tensor
from torch.distributed import TCPStore  # type: ignore[attr-defined]
from torch.distributed.distributed_c10d import BroadcastOptions, PrefixStore, ProcessGroupGloo
from vllm.distributed.weight_transfer.base import (
    TrainerInitInfo,
    TrainerWeightTransferEngine,
    WeightTransferInitInfo,
    WeightTransferUpdateInfo,
)

from flashquant.errors import ReloadError
from flashquant.patches.transfer.bracketed import Bracketed

_PATIENCE = timedelta(minutes=5)


@dataclass
class GlooRendezvous(TrainerInitInfo):  # type: ignore[misc]
    """Where trainer and workers meet.

    Attributes:
        host: of the trainer, as the workers reach it.
        port: a free one there.
        workers: how many will come: all ranks of the engine, of all its replicas.
        rank: of this trainer process; rank 0 sends, the others only gather.

    """

    backend: ClassVar[str] = "flashquant_gloo"

    host: str
    port: int
    workers: int


@dataclass
class Rendezvous(WeightTransferInitInfo):  # type: ignore[misc]
    """The same, as a worker is told."""

    host: str
    port: int
    workers: int


@dataclass
class Chunk(WeightTransferUpdateInfo):  # type: ignore[misc]
    """What will be broadcast, in this order."""

    names: list[str]
    dtypes: list[str]
    shapes: list[list[int]]


class GlooEngine(Bracketed):
    """A worker's end."""

    init_info_cls = Rendezvous
    update_info_cls = Chunk

    _group: ProcessGroupGloo | None = None

    def init_transfer_engine(self, init_info: Rendezvous) -> None:
        """Meet the trainer; blocks until everybody is there."""
        parallel = self.parallel_config
        own = parallel.data_parallel_index * parallel.world_size + parallel.rank
        self._group = _meet(init_info.host, init_info.port, init_info.workers, 1 + own)

    def receive_weights(self, update_info: Chunk) -> None:
        """Load what is broadcast, one tensor at a time.

        Raises:
            ReloadError: what `model.load_weights` refuses, after the rest was received.

        """
        stream = self._received(update_info)
        try:
            self.model.load_weights(stream)
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
        _broadcast(self._group, tensor)
        return name, tensor


class GlooTrainer(TrainerWeightTransferEngine):  # type: ignore[misc]
    """The trainer's end, driven by vLLM's `WeightTransferTrainerFactory`."""

    init_info_cls = GlooRendezvous

    _group: ProcessGroupGloo | None = None

    @classmethod
    def trainer_init(
        cls, init_info: GlooRendezvous, *, client: Any, source: Any = None
    ) -> GlooTrainer:
        """Meet the workers. Called on every rank of the trainer."""
        engine = cls(client=client, source=source, is_sender=init_info.is_sender)
        if engine.is_sender:
            told = Rendezvous(init_info.host, init_info.port, init_info.workers)
            with ThreadPoolExecutor(1) as beside:
                workers = beside.submit(client.init_weight_transfer_engine, asdict(told))
                engine._group = _meet(told.host, told.port, told.workers, 0)
                workers.result()
        return engine

    def send_weights(self) -> None:
        """One whole update. Called on every rank of the trainer: gathering is a collective."""
        metas = self.source.metadata()
        if not self.is_sender:
            for _ in self.source:
                pass
            return
        chunk = Chunk(
            names=[meta.name for meta in metas],
            dtypes=[str(meta.dtype) for meta in metas],
            shapes=[list(meta.shape) for meta in metas],
        )
        self.client.start_weight_update()
        with ThreadPoolExecutor(1) as beside:
            workers = beside.submit(self.client.update_weights, asdict(chunk))
            for _, tensor in self.source:
                _broadcast(self._group, tensor.detach().cpu().contiguous())
            workers.result()
        self.client.finish_weight_update()


_DTYPES = {
    str(dtype): dtype
    for dtype in (
        torch.bfloat16,
        torch.float16,
        torch.float32,
        torch.int8,
        torch.float8_e4m3fn,
    )
}


def _meet(host: str, port: int, workers: int, rank: int) -> ProcessGroupGloo:
    store = TCPStore(host, port, workers + 1, is_master=rank == 0, timeout=_PATIENCE)
    return ProcessGroupGloo(PrefixStore("flashquant", store), rank, workers + 1, _PATIENCE)


def _broadcast(group: Any, tensor: Tensor) -> None:
    """From rank 0 to all the others; gloo knows bytes only, so every dtype goes as such."""
    options = BroadcastOptions()
    options.rootRank, options.rootTensor = 0, 0
    if tensor.numel():
        group.broadcast([tensor.view(-1).view(torch.uint8)], options).wait()
