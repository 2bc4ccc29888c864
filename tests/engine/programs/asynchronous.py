"""An `AsyncLLM` that is updated again and again while clients generate.

Usage: python -m tests.engine.programs.asynchronous STARTS_ON PUSHED
Prints one JSON object: digests, versions, what failed, and one answer in flight.
"""

from __future__ import annotations

import asyncio
import sys
from pathlib import Path
from typing import Any

import torch

from tests.engine.programs.engine import OPTIONS, PROMPT, print_result
from tests.engine.programs.failing import fail_in_the_middle

UPDATES, CLIENTS = 10, 4


def versions_in(output: Any) -> list[list[Any]]:
    """Which version sampled which tokens, where vLLM tells."""
    spans = getattr(output, "weight_versions", None) or []
    return [[span.version, span.start, span.end] for span in spans]


async def main(starts_on: str, pushed: str) -> dict[str, Any]:
    from vllm import AsyncEngineArgs, SamplingParams
    from vllm.v1.engine.async_llm import AsyncLLM

    engine = AsyncLLM.from_engine_args(AsyncEngineArgs(starts_on, **OPTIONS))
    import flashquant

    async def answer(name: str, tokens: int) -> Any:
        sampling = SamplingParams(max_tokens=tokens, temperature=0, ignore_eos=True, logprobs=0)
        async for output in engine.generate(PROMPT, sampling, name):
            final = output
            seen[name] = len(output.outputs[0].token_ids)
        return final.outputs[0]

    result: dict[str, Any] = {"before": (await flashquant.status(engine)).digest}
    busy, spans, failed = True, [], []
    seen: dict[str, int] = {}

    async def client(number: int) -> None:
        turn = 0
        while busy:
            turn += 1
            try:
                output = await answer(f"{number}-{turn}", 32)
            except Exception as failure:  # whatever it is, the test looks at it
                failed.append(repr(failure))
                return
            spans.append(versions_in(output))

    clients = [asyncio.create_task(client(number)) for number in range(CLIENTS)]
    for update in range(UPDATES):
        await asyncio.sleep(0.2)
        weights = Path((pushed, starts_on)[update % 2])
        report = await flashquant.reload_weights(engine, weights, prepare=update % 4 > 1)
    busy = False
    await asyncio.gather(*clients)
    # Alone: what a sum is rounded to may depend on how many requests share a step.
    in_flight = asyncio.create_task(answer("in flight", 64))
    while not (seen.get("in flight") or in_flight.done()):  # done already, it has failed
        await asyncio.sleep(0.01)
    report = await flashquant.reload_weights(engine, Path(pushed))
    updated = seen.get("in flight", 0)
    output = await in_flight
    try:
        await flashquant.reload_weights(engine, {"typo": torch.zeros(1)})
    except flashquant.errors.ReloadError as refusal:
        result["refused"] = [type(refusal).__name__, str(refusal)]
    result |= {
        "after": (await flashquant.status(engine)).digest,
        "reported": report.digest,
        "version": report.version,
        "spans": spans,
        "failed": failed,
        "in flight": versions_in(output),
        "updated": updated,
        "said": [
            [t, step[t].logprob] for t, step in zip(output.token_ids, output.logprobs, strict=True)
        ],
    }
    await engine.collective_rpc(fail_in_the_middle, kwargs={"rank": 0, "dies": True})
    try:
        await flashquant.reload_weights(engine, Path(starts_on))
    except Exception as lost:  # whatever it is, the test looks at it
        result["lost"] = [type(lost).__name__, str(lost), 0]
    return result


if __name__ == "__main__":
    print_result(asyncio.run(main(*sys.argv[1:])))
