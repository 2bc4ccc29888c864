"""ms-swift's worker extension, called as its rollout server calls it.

Usage: python -m tests.stacks.programs.ms_swift STARTS_ON PUSHED

ms-swift's own: `WeightSyncWorkerExtension` with its three ways to receive, the flat buckets, and
`BucketedWeightSender`, by shared memory. Not its own, for want of a GPU: NCCL's communicator
(vLLM's store instead). Not run: the rollout server, Megatron, and the trainer, whose loops are
`by_name` and `in_buckets` here.
"""

from __future__ import annotations

import asyncio
import os
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any
from unittest import mock

import torch
import zmq
from swift.pipelines.infer import rollout
from swift.ray.megatron.rollout.weight_transfer import BucketedWeightSender
from swift.rlhf_trainers.utils import FlattenedTensorBucket
from torch import Tensor
from vllm.distributed.utils import StatelessProcessGroup

from tests.stacks.programs import gloo
from tests.stacks.programs.rollouts import beside, print_result, raised_by, said, start
from tests.support import cuda, nccl
from tools.models import tiny_models

_TENSORS_A_BUCKET = 5


class OnCpu(rollout.WeightSyncWorkerExtension):
    """The extension as it is; what it asks of CUDA, the CPU answers."""

    def init_communicator(self, *arguments: Any) -> None:
        with mock.patch.object(rollout, "PyNcclCommunicator", nccl.Communicator):
            super().init_communicator(*arguments)

    def update_named_param(self, *arguments: Any) -> None:
        with cuda.answered_by_the_cpu():
            super().update_named_param(*arguments)

    def update_flattened_params(self, *arguments: Any) -> None:
        with cuda.answered_by_the_cpu():
            super().update_flattened_params(*arguments)


class Trainer:
    """The ways in which it pushes, each to its end: `process_weights_after_loading`."""

    def __init__(self, llm: Any) -> None:
        self._llm = llm
        host, port = "127.0.0.1", gloo.free_port()
        with beside(llm, "init_communicator", host, port, 2):
            group = StatelessProcessGroup.create(host=host, port=port, rank=1, world_size=2)
        self._communicator = nccl.Communicator(group, None)

    def by_name(self, weights: dict[str, Tensor]) -> None:
        for name, tensor in weights.items():
            with self._receiving("update_named_param", name, str(tensor.dtype), tensor.shape):
                self._communicator.broadcast(tensor, src=1)
        self._end()

    def in_buckets(self, weights: dict[str, Tensor]) -> None:
        pairs = list(weights.items())
        for first in range(0, len(pairs), _TENSORS_A_BUCKET):
            bucket = FlattenedTensorBucket(pairs[first : first + _TENSORS_A_BUCKET])
            metadata = [one.model_dump() for one in bucket.get_metadata()]
            with self._receiving("update_flattened_params", metadata):
                self._communicator.broadcast(bucket.get_flattened_tensor(), src=1)
        self._end()

    def through_shared_memory(self, weights: dict[str, Tensor]) -> None:
        handle = f"ipc:///tmp/swift-{os.getpid()}.sock"

        async def send() -> None:
            async with BucketedWeightSender(handle, bucket_size_mb=1, use_shm=True) as sender:
                await sender.handshake()
                await sender.send_weights(weights)

        with beside(self._llm, "update_weights_from_ipc", True, handle, 20):
            asyncio.run(send())

    @contextmanager
    def _receiving(self, method: str, *arguments: Any) -> Iterator[None]:
        with beside(self._llm, method, *arguments):
            yield
            self._communicator.group.barrier()

    def _end(self) -> None:
        self._llm.collective_rpc("process_weights_after_loading")


def main(starts_on: str, pushed: str) -> dict[str, Any]:
    import flashquant

    zmq.Context.instance().setsockopt(zmq.RCVTIMEO, 20_000)  # for when nobody answers
    a, b = (tiny_models.tensors(Path(path)) for path in (starts_on, pushed))
    llm = start(starts_on, worker_extension_cls=f"{__spec__.name}.{OnCpu.__name__}")
    result: dict[str, Any] = {"started": said(llm)}
    trainer = Trainer(llm)

    def push(way: Callable[[dict[str, Tensor]], None], weights: dict[str, Tensor]) -> Any:
        way(weights)
        return said(llm)

    result["by name"] = push(trainer.by_name, b)
    result["in buckets"] = push(trainer.in_buckets, a)
    result["through shared memory"] = push(trainer.through_shared_memory, b)

    norm = "model.norm.weight"
    result["refused"] = raised_by(lambda: trainer.in_buckets({norm: b[norm] * torch.nan}))
    result["after refusal"] = said(llm)
    v = "model.layers.1.self_attn.v_proj.weight"
    lacking = {name: tensor for name, tensor in a.items() if name != v}
    result["without v_proj"] = raised_by(lambda: trainer.in_buckets(lacking))
    result["refusal"] = str(flashquant.status(llm).refusal)
    result["completed"] = push(trainer.in_buckets, a)
    return result


if __name__ == "__main__":
    print_result(main(*sys.argv[1:]))
