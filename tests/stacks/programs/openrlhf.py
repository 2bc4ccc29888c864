"""OpenRLHF's worker extension, called as its actor calls it.

Usage: python -m tests.stacks.programs.openrlhf STARTS_ON PUSHED

`WorkerWrap` is OpenRLHF's own, with all of its three methods. Not its own, for want of a GPU:
NCCL's communicator (gloo instead), CUDA's IPC (shared memory instead), and the actor, whose
loop is `by_broadcast` and `by_ipc` here.
"""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any
from unittest import mock

import torch
from openrlhf.trainer.ray.vllm_worker_wrap import WorkerWrap
from torch import Tensor

from tests.stacks.programs import gloo, shared
from tests.stacks.programs.rollouts import beside, print_result, raised_by, said, start
from tests.support import cuda
from tools.models import tiny_models


class OnCpu(WorkerWrap):
    """The extension as it is; what it asks of CUDA, the CPU answers."""

    def init_process_group(self, *arguments: Any) -> None:
        with mock.patch("openrlhf.utils.distributed_util.stateless_init_process_group", gloo.meet):
            super().init_process_group(*arguments)

    def update_weight(self, *arguments: Any) -> None:
        with cuda.answered_by_the_cpu():
            super().update_weight(*arguments)

    def update_weight_cuda_ipc(self, *arguments: Any) -> None:
        with cuda.answered_by_the_cpu():
            super().update_weight_cuda_ipc(*arguments)


class Actor:
    """The two ways in which the policy actor pushes: a tensor a call."""

    def __init__(self, llm: Any) -> None:
        self._llm = llm
        host, port = "127.0.0.1", gloo.free_port()
        with beside(llm, "init_process_group", host, port, 1, 2, "openrlhf", "nccl", False):
            self._group = gloo.meet(host, port, 0, 2)

    def by_broadcast(self, weights: dict[str, Tensor]) -> None:
        for name, tensor in weights.items():
            with beside(self._llm, "update_weight", name, tensor.dtype, tensor.shape, False):
                self._group.broadcast(tensor, src=0)

    def by_ipc(self, weights: dict[str, Tensor]) -> None:
        for name, tensor in weights.items():
            buffer = shared.Buffer(tensor.nbytes)
            buffer.fill([tensor])
            handles = {cuda.GPU: buffer.as_tensor(tensor.dtype, tensor.shape)}
            arguments = (name, tensor.dtype, tensor.shape, handles, False)
            self._llm.collective_rpc("update_weight_cuda_ipc", args=arguments)
            buffer.spoil()
            buffer.close()


def main(starts_on: str, pushed: str) -> dict[str, Any]:
    a, b = (tiny_models.tensors(Path(path)) for path in (starts_on, pushed))
    llm = start(starts_on, worker_extension_cls="tests.stacks.programs.openrlhf.OnCpu")
    import flashquant

    result = {"started": said(llm)}
    actor = Actor(llm)
    actor.by_broadcast(b)
    result["broadcast"] = said(llm)
    actor.by_ipc(a)
    result["ipc"] = said(llm)

    norm = {"model.norm.weight": b["model.norm.weight"] * torch.nan}
    result["refused"] = raised_by(lambda: actor.by_broadcast(norm))
    result["after refusal"] = said(llm)
    v = "model.layers.1.self_attn.v_proj.weight"
    actor.by_broadcast({name: tensor for name, tensor in b.items() if name != v})
    result["without v_proj"] = list(flashquant.status(llm).pending)
    actor.by_broadcast({v: b[v]})
    return {**result, "completed": said(llm)}


if __name__ == "__main__":
    print_result(main(*sys.argv[1:]))
