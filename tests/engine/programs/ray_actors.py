"""Engines inside Ray actors, as OpenRLHF, verl and SkyRL run them; and a worker that is one.

Usage: python -m tests.engine.programs.ray_actors STARTS_ON PUSHED
Prints one JSON object: the digests of an engine in an actor and of a bare
`RayWorkerWrapper` before and after a push. Each process says in its log whether it is patched.

vLLM refuses its Ray executor on a CPU; its worker class runs, started here by the calls
that the executor makes. What that does not show is the executor itself.
"""

from __future__ import annotations

import os
import sys
from pathlib import Path
from typing import Any

import ray

from tests.engine.programs.engine import OPTIONS, PROMPT, print_result
from tools.models import tiny_models


class EngineActor:
    """Nothing in it imports flashquant: vLLM's plugin loader does."""

    def __init__(self, checkpoint: str) -> None:
        from vllm import LLM

        self.llm = LLM(checkpoint, **OPTIONS)

    def push(self, weights: dict[str, Any]) -> str | None:
        import flashquant

        return flashquant.reload_weights(self.llm, weights).digest

    def digest(self) -> str | None:
        import flashquant

        return flashquant.status(self.llm).digest

    def processes(self) -> list[int]:
        members = self.llm.collective_rpc("flashquant_member")
        return [os.getpid(), *(pid for _, _, pid, _ in members)]

    def tokens(self) -> list[int]:
        from vllm import SamplingParams

        sampling = SamplingParams(max_tokens=16, temperature=0, ignore_eos=True)
        (said,) = self.llm.generate([PROMPT], sampling, use_tqdm=False)
        return list(said.outputs[0].token_ids)


def bare_worker(starts_on: str, weights: Any) -> dict[str, Any]:
    """Start one worker actor as vLLM's Ray executor does, and push to it."""
    from vllm import EngineArgs
    from vllm.utils.network_utils import get_distributed_init_method, get_open_port
    from vllm.v1.executor.ray_utils import RayWorkerWrapper

    config = EngineArgs(starts_on, **OPTIONS).create_engine_config()
    worker = ray.remote(num_cpus=0)(RayWorkerWrapper).remote(rpc_rank=0)

    def call(method: str, *args: Any) -> Any:
        return ray.get(worker.execute_method.remote(method, *args))

    start = {
        "vllm_config": config,
        "local_rank": 0,
        "rank": 0,
        "distributed_init_method": get_distributed_init_method("127.0.0.1", get_open_port()),
        "is_driver_worker": True,
    }
    call("init_worker", [start])
    call("init_device")
    call("load_model")
    before = call("flashquant_status")["digest"]
    answer = call("flashquant_try_reload", weights)
    return {
        "before": before,
        "reported": answer["answer"]["digest"],
        "after": call("flashquant_status")["digest"],
        "process": call("flashquant_member")[2],
    }


def main(starts_on: str, pushed: str) -> dict[str, Any]:
    ray.init(num_cpus=2, include_dashboard=False, log_to_driver=False)
    weights = ray.put(tiny_models.tensors(Path(pushed)))
    engine = ray.remote(num_cpus=0)(EngineActor).remote(starts_on)
    result = {
        "before": ray.get(engine.digest.remote()),
        "reported": ray.get(engine.push.remote(weights)),
        "after": ray.get(engine.digest.remote()),
        "tokens": ray.get(engine.tokens.remote()),
        "processes": [os.getpid(), *ray.get(engine.processes.remote())],
        "worker": bare_worker(starts_on, ray.get(weights)),
    }
    ray.shutdown()
    return result


if __name__ == "__main__":
    print_result(main(*sys.argv[1:]))
