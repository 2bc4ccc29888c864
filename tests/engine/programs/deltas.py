"""Bundles of what changed, for workers in other processes.

Usage: python -m tests.engine.programs.deltas KIND STARTS_ON PUSHED
KIND is `ranks` (an LLM over two ranks) or `asynchronous` (an AsyncLLM).
Prints one JSON object: digests by rank after deltas, and after whole reloads of the same weights.
"""

from __future__ import annotations

import asyncio
import os
import sys
from pathlib import Path
from typing import Any

from tests.engine.programs.engine import OPTIONS, print_result
from tests.engine.programs.failing import fail_in_the_middle, raised_by
from tests.engine.trainer import stepped

STEPS = int(os.environ.get("DELTA_STEPS", "2"))  # in a row


def ranks(starts_on: str, pushed: str) -> dict[str, Any]:
    from vllm import LLM

    import flashquant
    from flashquant.sender import Sender
    from tools.models.tiny_models import tensors

    llm = LLM(starts_on, **OPTIONS, tensor_parallel_size=2)
    b = {name: tensor.clone() for name, tensor in tensors(Path(pushed)).items()}
    sender = Sender(flashquant.manifest(llm), delta=True)
    result: dict[str, Any] = {"digest before": flashquant.manifest(llm).digest}

    result["whole"] = flashquant.apply_delta(llm, sender.bundle(b)).ranks
    result["digest"] = [flashquant.manifest(llm).digest, sender.snapshot().header.digest]
    result["reload"] = flashquant.reload_weights(llm, b).ranks

    delta = sender.bundle(stepped(b))
    llm.collective_rpc(fail_in_the_middle, kwargs={"rank": 1, "dies": False})
    result["failed"] = raised_by(lambda: flashquant.apply_delta(llm, delta))
    result["after failure"] = flashquant.status(llm).ranks
    result["delta"] = flashquant.apply_delta(llm, delta).ranks
    result["stale"] = raised_by(lambda: flashquant.apply_delta(llm, delta))
    result["after stale"] = flashquant.status(llm).ranks
    weights = stepped(b)
    for _ in range(STEPS):
        weights = stepped(weights)
        result["after many"] = flashquant.apply_delta(llm, sender.bundle(weights)).ranks
    result["reload of these"] = flashquant.reload_weights(llm, weights).ranks
    result["reload of the same"] = flashquant.reload_weights(llm, stepped(b)).ranks
    last = sender.bundle({name: -t for name, t in weights.items()})  # every layer changes
    flashquant.apply_delta(llm, Sender(flashquant.manifest(llm), delta=True).bundle(weights))
    llm.collective_rpc(fail_in_the_middle, kwargs={"rank": 1, "dies": True})
    result["died"] = raised_by(lambda: flashquant.apply_delta(llm, last))
    return result


async def asynchronous(starts_on: str, pushed: str) -> dict[str, Any]:
    from vllm import AsyncEngineArgs
    from vllm.v1.engine.async_llm import AsyncLLM

    engine = AsyncLLM.from_engine_args(AsyncEngineArgs(starts_on, **OPTIONS))
    import flashquant
    from flashquant.sender import Sender
    from tools.models.tiny_models import tensors

    b = {name: tensor.clone() for name, tensor in tensors(Path(pushed)).items()}
    sender = Sender(await flashquant.manifest(engine), delta=True)
    await flashquant.apply_delta(engine, sender.bundle(b))
    delta = sender.bundle(stepped(b))
    result: dict[str, Any] = {"delta": (await flashquant.apply_delta(engine, delta)).digest}
    try:
        await flashquant.apply_delta(engine, delta)
    except flashquant.errors.StaleBase as refusal:
        result["stale"] = ["StaleBase", str(refusal)]
    result["reload"] = (await flashquant.reload_weights(engine, stepped(b))).digest
    return result


if __name__ == "__main__":
    kind, *checkpoints = sys.argv[1:]
    print_result(
        ranks(*checkpoints) if kind == "ranks" else asyncio.run(asynchronous(*checkpoints))
    )
