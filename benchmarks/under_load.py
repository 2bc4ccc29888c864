"""An engine that clients keep busy, while prepared updates come: how long does each pause it?"""

from __future__ import annotations

import asyncio
import time
from collections.abc import Sequence
from pathlib import Path
from statistics import median
from typing import Any

import torch

from benchmarks.results import milliseconds

Weights = Any  # what `flashquant.reload_weights` takes
TITLES = ("scheme", "prepare", "pause", "copy", "pause / copy", "written", "tokens meanwhile")


def copy_of_codes(worker: Any) -> list[float]:
    """Seconds to copy what this worker's kernels read, five times, and its bytes. Runs there."""
    from flashquant.patches.seams.loading import session_of

    layers = session_of(worker.get_model())._engine.layers
    live = [t for layer in layers for _, t in layer.tensors() if t.numel()]
    copies = [t.detach().clone() for t in live]
    seconds = []
    for _ in range(5):
        _wait()
        start = time.perf_counter()
        for into, tensor in zip(copies, live, strict=True):
            into.copy_(tensor.detach())
        _wait()
        seconds.append(time.perf_counter() - start)
    return [median(seconds), float(sum(t.nbytes for t in live))]


def _wait() -> None:
    if torch.cuda.is_available():
        torch.cuda.synchronize()


async def measure(
    path: Path, policies: Sequence[Weights], updates: int, clients: int, **options: Any
) -> dict[str, Any]:
    """One engine, under load.

    Args:
        path: the checkpoint that it starts on.
        policies: what is pushed, in turn: anything that `reload_weights` takes.
        updates: that count, after one that makes the plans.
        clients: that generate all the time.
        options: of the engine, beside those of a small one.

    """
    from vllm import AsyncEngineArgs, SamplingParams
    from vllm.v1.engine.async_llm import AsyncLLM

    import flashquant

    engine = AsyncLLM.from_engine_args(
        AsyncEngineArgs(
            str(path),
            skip_tokenizer_init=True,
            **({"enforce_eager": True} | options),
            max_model_len=512,
            kv_cache_memory_bytes=64 << 20,
            dtype="bfloat16",
        )
    )
    busy, tokens = True, [0]

    async def client(number: int) -> None:
        turn = 0
        while busy:
            turn += 1
            sampling = SamplingParams(max_tokens=8, temperature=0, ignore_eos=True)
            prompt = {"prompt_token_ids": list(range(5 + number, 45 + number))}
            async for _ in engine.generate(prompt, sampling, f"{number}-{turn}"):
                tokens[0] += 1

    working = [asyncio.create_task(client(number)) for number in range(clients)]
    reports, copies, meanwhile = [], [], []
    for update in range(updates + 1):
        await asyncio.sleep(0.3)
        before = tokens[0]
        report = await flashquant.reload_weights(
            engine, policies[(update + 1) % len(policies)], prepare=True
        )
        meanwhile.append(tokens[0] - before)
        (copied,) = await engine.collective_rpc(copy_of_codes)
        if update:  # the first makes the plans
            reports.append(report)
            copies.append(copied)
    busy = False
    await asyncio.gather(*working)
    engine.shutdown()
    return {
        "prepare": [report.prepare_seconds for report in reports],
        "pause": [report.pause_seconds for report in reports],
        "bytes": reports[-1].bytes_out,
        "copy": [seconds for seconds, _ in copies],
        "held": copies[-1][1],
        "tokens": meanwhile[1:],
    }


def row(scheme: str, found: dict[str, Any]) -> list[str]:
    pause, copy = median(found["pause"]), median(found["copy"])
    return [
        scheme,
        milliseconds(median(found["prepare"])),
        milliseconds(pause),
        milliseconds(copy),
        f"{pause / copy:.2f}x",
        f"{found['bytes'] / 1e6:.0f} of {found['held'] / 1e6:.0f} MB",
        f"{median(found['tokens']):.0f}",
    ]
