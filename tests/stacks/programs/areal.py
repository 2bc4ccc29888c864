"""AReaL's worker extension, called as its vLLM server calls it.

Usage: python -m tests.stacks.programs.areal STARTS_ON PUSHED

`VLLMWorkerExtension` is AReaL's own, and so is the process group, made at both ends by its
`init_custom_process_group`: AReaL asks for a backend, and gloo is one. Not its own: the HTTP
routes and the trainer's loop (`by_broadcast`).
"""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any
from unittest import mock

import torch
from areal.engine.core.distributed import init_custom_process_group
from areal.engine.vllm_ext.vllm_worker_extension import VLLMWorkerExtension
from torch import Tensor
from vllm.triton_utils import dispatcher

from tests.stacks.programs import gloo
from tests.stacks.programs.rollouts import beside, print_result, said, start
from tools.models import tiny_models

_GROUP = "update_weight_group_0"
_EXTENSION = f"tests.stacks.programs.areal.{VLLMWorkerExtension.__name__}"

_REBIND = dispatcher._rebind_kernels


def _rebind_in_vllm(overrides: list[Any]) -> None:
    """vLLM's CPU build looks at every global of every module imported so far.

    It falls over those of Flask and llvmlite, which AReaL imports; vLLM's own are enough.
    """
    with mock.patch.dict(sys.modules):
        for name in [name for name in sys.modules if name.partition(".")[0] != "vllm"]:
            del sys.modules[name]
        _REBIND(overrides)


dispatcher._rebind_kernels = _rebind_in_vllm


class Trainer:
    """What the FSDP engine does: tell the form of a bucket, then broadcast its tensors."""

    def __init__(self, llm: Any) -> None:
        self._llm = llm
        address, port = "127.0.0.1", gloo.free_port()
        arguments = (address, str(port), 1, 2, "gloo", _GROUP)
        with beside(llm, "areal_init_update_weight_group", *arguments) as answer:
            self._group = init_custom_process_group(
                backend="gloo",
                world_size=2,
                init_method=f"tcp://{address}:{port}",
                rank=0,
                group_name=_GROUP,
            )
        assert answer.result() == [(True, "Success")], answer.result()

    def by_broadcast(self, weights: dict[str, Tensor], tensors_a_bucket: int = 6) -> list[Any]:
        """Every answer of the workers: AReaL catches what its methods raise."""
        pairs = list(weights.items())
        answers = []
        for first in range(0, len(pairs), tensors_a_bucket):
            bucket = dict(pairs[first : first + tensors_a_bucket])
            dtypes = [str(tensor.dtype).removeprefix("torch.") for tensor in bucket.values()]
            shapes = [list(tensor.shape) for tensor in bucket.values()]
            meta = (list(bucket), dtypes, shapes, _GROUP)
            self._llm.collective_rpc("areal_set_weight_meta", args=meta)
            with beside(self._llm, "areal_update_weight_xccl") as answer:
                for tensor in bucket.values():
                    torch.distributed.broadcast(tensor, src=0, group=self._group)
            answers += answer.result()
        return answers


def from_disk(llm: Any, path: str) -> list[Any]:
    return list(llm.collective_rpc("areal_update_weights", args=(path,)))


def main(starts_on: str, pushed: str) -> dict[str, Any]:
    b = tiny_models.tensors(Path(pushed))
    llm = start(starts_on, worker_extension_cls=_EXTENSION)
    result: dict[str, Any] = {"started": said(llm)}
    trainer = Trainer(llm)
    result["broadcast answers"] = trainer.by_broadcast(b)
    result["broadcast"] = said(llm)
    result["disk answers"] = from_disk(llm, starts_on)
    result["disk"] = said(llm)
    norm = {"model.norm.weight": b["model.norm.weight"] * torch.nan}
    result["refused"] = trainer.by_broadcast(norm)
    return {**result, "after refusal": said(llm)}


if __name__ == "__main__":
    print_result(main(*sys.argv[1:]))
