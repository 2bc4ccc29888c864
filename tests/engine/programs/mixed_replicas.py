"""Two data-parallel replicas that share the experts of one mixture, each an engine core.

Usage: python -m tests.engine.programs.mixed_replicas STARTS_ON PUSHED CUT
CUT is `experts` (each replica has some of them) or `columns` (a part of each).
Prints one JSON object: digests by rank, answers before and after pushes, and of each push what it
raised and what was said meanwhile.

vLLM's communicator for the CPU cannot exchange tokens of two replicas (`all_gatherv`,
`reduce_scatterv`); `Exchange` teaches it, in each worker, before the model is made.
"""

from __future__ import annotations

import asyncio
import itertools
import operator
import sys
import time
from collections.abc import Awaitable, Callable, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from tests.engine.kernels import mind_the_map_of_experts
from tests.engine.programs.engine import OPTIONS, PROMPT, print_result
from tests.engine.programs.failing import fail_at_the_end, fail_in_the_middle
from tools.models import tiny_models

PROMPT_IDS: list[int] = PROMPT["prompt_token_ids"]


def _all_gatherv(
    communicator: Any, given: Any, dim: int = 0, sizes: list[int] | None = None
) -> Any:
    """Rows of all ranks, in their order; of each tensor of a list."""
    if isinstance(given, list):
        return [_all_gatherv(communicator, one, dim, sizes) for one in given]
    sizes = sizes or [given.shape[0]] * communicator.world_size
    mine = given.new_zeros(max(sizes), *given.shape[1:])  # gloo gathers equal shapes only
    mine[: len(given)] = given
    parts = [torch.empty_like(mine) for _ in sizes]
    torch.distributed.all_gather(parts, mine, group=communicator.cpu_group)
    return torch.cat([part[:size] for part, size in zip(parts, sizes, strict=True)])


def _reduce_scatterv(
    communicator: Any, given: Tensor, dim: int = -1, sizes: list[int] | None = None
) -> Tensor:
    """Of the sum over all ranks, the rows that belong to this one."""
    total = given.clone()
    torch.distributed.all_reduce(total, group=communicator.cpu_group)
    sizes = sizes or [len(total) // communicator.world_size] * communicator.world_size
    return total.split(sizes)[communicator.rank_in_group]


class Exchange:
    """What a worker is made of, too (`worker_extension_cls`): naming it imports this module."""


if __name__ != "__main__":
    from vllm.distributed.device_communicators.cpu_communicator import CpuCommunicator

    CpuCommunicator.all_gatherv = _all_gatherv
    CpuCommunicator.reduce_scatterv = _reduce_scatterv
    mind_the_map_of_experts()

LONG = 80  # tokens of an answer that a push meets


async def main(starts_on: str, pushed: str, cut: str) -> dict[str, Any]:
    from vllm import AsyncEngineArgs, SamplingParams
    from vllm.v1.engine.async_llm import AsyncLLM

    exchange = f"tests.engine.programs.mixed_replicas.{Exchange.__name__}"
    arguments = AsyncEngineArgs(
        starts_on,
        **OPTIONS,
        data_parallel_size=2,
        enable_expert_parallel=cut == "experts",
        worker_extension_cls=exchange,
    )
    engine = AsyncLLM.from_engine_args(arguments)
    import flashquant
    from flashquant.sender import Sender

    names = itertools.count()

    async def tokens(replica: int, prompt: list[int], count: int = LONG) -> list[int]:
        sampling = SamplingParams(max_tokens=count, temperature=0, ignore_eos=True)
        given, name = {"prompt_token_ids": prompt}, str(next(names))
        async for output in engine.generate(given, sampling, name, data_parallel_rank=replica):
            final = output
        return list(final.outputs[0].token_ids)

    async def answers() -> list[list[int]]:
        return await asyncio.gather(*(tokens(replica, PROMPT_IDS) for replica in range(2)))

    async def ranks() -> Sequence[str]:
        return (await flashquant.status(engine)).ranks

    async def while_generating(
        push: Callable[[], Awaitable[object]], replicas: Sequence[int], old: list[int]
    ) -> dict[str, Any]:
        """A push that meets a long answer of each of these.

        What they said begins as `old`; of the rest: what is said after that now.
        """
        running = [asyncio.create_task(tokens(replica, PROMPT_IDS)) for replica in replicas]
        await asyncio.sleep(0.3)
        met = not any(task.done() for task in running)
        refused = await raised(push())
        found = {"refused": refused, "met": met, "ranks": await ranks(), "said": [], "anew": []}
        for replica, said in zip(replicas, await asyncio.gather(*running), strict=True):
            same = sum(itertools.takewhile(bool, map(operator.eq, said, old)))
            anew = (
                await tokens(replica, PROMPT_IDS + said[:same], LONG - same) if same < LONG else []
            )
            found["said"].append(said[same:])
            found["anew"].append(anew)
        return found

    def push(path: str, **options: Any) -> Callable[[], Awaitable[object]]:
        return lambda: flashquant.reload_weights(engine, path, **options)

    result: dict[str, Any] = {"start": await ranks(), "a": await answers()}
    a, _ = result["a"]
    result["both run"] = await while_generating(push(pushed), (0, 1), a)
    result["b"] = await answers()
    b, _ = result["b"]
    result["prepared"] = await while_generating(push(starts_on, prepare=True), (0, 1), b)
    result["a again"] = await answers()

    await _of_replica(engine, 1, fail_in_the_middle, rank=0, dies=False)
    result["one fails"] = await while_generating(push(pushed), (0, 1), a)
    result["one runs"] = await while_generating(push(pushed), (0,), a)
    result["b again"] = await answers()

    await _of_replica(engine, 1, fail_at_the_end)
    result["split"] = await raised(push(starts_on)())
    result["asked"] = await answers()
    sender = Sender(await flashquant.manifest(engine), delta=True)
    await flashquant.apply_delta(engine, sender.bundle(tiny_models.tensors(Path(starts_on))))
    result["healed"] = [await ranks(), await answers()]
    delta = sender.bundle(tiny_models.tensors(Path(pushed)))
    await flashquant.apply_delta(engine, delta)
    result["by a delta"] = [await ranks(), await answers()]
    return result


async def _of_replica(engine: Any, replica: int, method: Any, **arguments: Any) -> None:
    client = engine.engine_core
    where = client.core_engines[replica]
    await client._call_utility_async("collective_rpc", method, None, (), arguments, engine=where)


async def raised(push: Awaitable[object]) -> tuple[str, str, float]:
    """As `raised_by`, of what is awaited."""
    began = time.monotonic()
    try:
        await push
    except Exception as failure:  # whatever it is, the test looks at it
        return type(failure).__name__, str(failure), time.monotonic() - began
    return "nothing", "", time.monotonic() - began


if __name__ == "__main__":
    print_result(asyncio.run(main(*sys.argv[1:])))
