"""The trainer's end of gloo: it broadcasts each tensor over TCP, and every worker receives it.

    trainer = WeightTransferTrainerFactory.trainer_init(
        GlooRendezvous(host="10.0.0.1", port=29700, workers=2, rank=0),
        client=HTTPVLLMWeightSyncClient("http://10.0.0.2:8000"),
        source=ModuleSource(model),
    )
    trainer.send_weights()                       once a step; or, of a `flashquant.sender.Sender`:
    trainer.send_delta(sender.bundle(weights))

vLLM has a trainer's end since 0.26; there the factory also takes the backend's name, and a config.
"""

from __future__ import annotations

from collections.abc import Iterable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass
from typing import Any, ClassVar

from torch import Tensor
from torch.distributed.distributed_c10d import ProcessGroupGloo
from vllm.distributed.weight_transfer.base import TrainerInitInfo, TrainerWeightTransferEngine

from flashquant.patches.transfer.gloo_worker import Chunk, Rendezvous, broadcast, meet
from flashquant.sender import Delta


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


class GlooTrainer(TrainerWeightTransferEngine):  # type: ignore[misc]
    """The trainer's end, driven by vLLM's `WeightTransferTrainerFactory`."""

    init_info_cls = GlooRendezvous

    _group: ProcessGroupGloo | None = None

    def __init__(self, *, client: Any, source: Any, is_sender: bool) -> None:
        # Not super().__init__: vLLM 0.26 wants a config there, which this engine has no use for.
        self.client, self.source, self.is_sender = client, source, is_sender

    @classmethod
    def trainer_init(
        cls, init_info: GlooRendezvous, *, client: Any, source: Any = None, config: Any = None
    ) -> GlooTrainer:
        """Meet the workers. Called on every rank of the trainer; `config` is vLLM 0.26's."""
        engine = cls(client=client, source=source, is_sender=init_info.is_sender)
        if engine.is_sender:
            told = Rendezvous(init_info.host, init_info.port, init_info.workers)
            with ThreadPoolExecutor(1) as beside:
                workers = beside.submit(client.init_weight_transfer_engine, asdict(told))
                engine._group = meet(told.host, told.port, told.workers, 0)
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
        self._send(chunk, (tensor for _, tensor in self.source))

    def send_delta(self, delta: Delta) -> None:
        """One whole update: what changed, as `flashquant.sender.Sender` makes it. Rank 0 alone."""
        parts = delta.parts
        chunk = Chunk(
            names=list(parts),
            dtypes=[str(part.dtype) for part in parts.values()],
            shapes=[list(part.shape) for part in parts.values()],
            delta=delta.header.model_dump_json(),
        )
        self._send(chunk, parts.values())

    def _send(self, chunk: Chunk, tensors: Iterable[Tensor]) -> None:
        self.client.start_weight_update()
        with ThreadPoolExecutor(1) as beside:
            workers = beside.submit(self.client.update_weights, asdict(chunk))
            for tensor in tensors:
                broadcast(self._group, tensor.detach().cpu().contiguous())
            workers.result()
        self.client.finish_weight_update()
