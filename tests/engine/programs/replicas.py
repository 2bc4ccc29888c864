"""Two data-parallel replicas behind one front end, each with its own entry of FLASHRL_CONFIG.

Usage: python -m tests.engine.programs.replicas STARTS_ON PUSHED
Prints one JSON object: scheme and digest of each replica before and after a push, and what
each of them says after it.
"""

from __future__ import annotations

import asyncio
import sys
from pathlib import Path
from typing import Any

from tests.engine.programs.engine import OPTIONS, PROMPT, print_result
from tools.models import tiny_models


async def main(starts_on: str, pushed: str) -> dict[str, Any]:
    from vllm import AsyncEngineArgs, SamplingParams
    from vllm.v1.engine.async_llm import AsyncLLM

    engine = AsyncLLM.from_engine_args(AsyncEngineArgs(starts_on, **OPTIONS, data_parallel_size=2))
    import flashquant

    async def tokens(name: str, rank: int) -> list[int]:
        sampling = SamplingParams(max_tokens=16, temperature=0, ignore_eos=True)
        async for output in engine.generate(PROMPT, sampling, name, data_parallel_rank=rank):
            final = output
        return list(final.outputs[0].token_ids)

    before = await flashquant.status(engine)
    report = await flashquant.reload_weights(engine, tiny_models.tensors(Path(pushed)))
    return {
        "scheme": before.scheme,
        "before": before.ranks,
        "reported": report.ranks,
        "after": (await flashquant.status(engine)).ranks,
        "tokens": [await tokens(f"to {rank}", rank) for rank in range(2)],
    }


if __name__ == "__main__":
    print_result(asyncio.run(main(*sys.argv[1:])))
