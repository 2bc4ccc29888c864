"""verl's worker extension, fed by verl's own sender.

Usage: python -m tests.stacks.programs.verl STARTS_ON PUSHED

verl's own: `vLLMColocateWorkerExtension`, `BucketedWeightSender` and `BucketedWeightReceiver`,
by shared memory, which verl has for NPUs (`use_shm=True`). Ours: a verl platform that is the
CPU. Not run: Ray, FSDP, the HTTP server around the engine.
"""

from __future__ import annotations

import asyncio
import os
import sys
from pathlib import Path
from typing import Any
from unittest import mock

import zmq
from torch import Tensor
from verl.plugin.platform import set_platform
from verl.plugin.platform.platform_cuda import PlatformCUDA
from verl.workers.rollout.vllm_rollout.bucketed_weight_transfer import BucketedWeightSender
from verl.workers.rollout.vllm_rollout.utils import vLLMColocateWorkerExtension

from tests.stacks.programs.rollouts import beside, print_result, raised_by, said, start
from tools.models import tiny_models


class PlatformCPU(PlatformCUDA):
    """One device that has nothing to synchronize and no caches."""

    device_name = "cpu"
    device_module = mock.Mock()

    def is_available(self) -> bool:
        return True

    def current_device(self) -> int:
        return 0

    def is_ipc_supported(self) -> bool:
        return False


set_platform(PlatformCPU())

EXTENSION = f"tests.stacks.programs.verl.{vLLMColocateWorkerExtension.__name__}"


def push(llm: Any, weights: dict[str, Tensor]) -> None:
    """As verl's `ServerAdapter.update_weights`: the workers receive, the sender sends."""
    handle = f"ipc:///tmp/rl-colocate-zmq-{os.environ['VERL_RAY_JOB_ID']}-replica-0-rank-0.sock"
    sender = BucketedWeightSender(zmq_handle=handle, bucket_size_mb=1, use_shm=True)
    with beside(llm, "update_weights_from_ipc", None, False, True):
        asyncio.run(sender.async_send_weights(iter(weights.items())))


def main(starts_on: str, pushed: str) -> dict[str, Any]:
    import flashquant

    os.environ["VERL_RAY_JOB_ID"] = str(os.getpid())  # for the workers, too
    zmq.Context.instance().setsockopt(zmq.RCVTIMEO, 20_000)  # for when nobody answers
    a, b = (tiny_models.tensors(Path(path)) for path in (starts_on, pushed))
    # verl's default: the engine starts on random weights, the first push brings the real ones.
    llm = start(starts_on, worker_extension_cls=EXTENSION, load_format="dummy")
    llm.collective_rpc("monkey_patch_model", args=(1000,))
    result: dict[str, Any] = {"started": said(llm)}
    push(llm, a)
    result["pushed a first"] = said(llm)
    push(llm, b)
    result["pushed b"] = said(llm)

    v = "model.layers.1.self_attn.v_proj.weight"
    result["half a layer"] = raised_by(lambda: push(llm, {n: a[n] for n in a if n != v}))
    result["pending"] = list(flashquant.status(llm).pending)
    push(llm, b)
    result["pushed b again"] = said(llm)

    bad = {**a, "model.norm.weight": a["model.norm.weight"] * float("nan")}
    result["refused"] = raised_by(lambda: push(llm, bad))
    push(llm, a)
    return {**result, "pushed a": said(llm)}


if __name__ == "__main__":
    print_result(main(*sys.argv[1:]))
