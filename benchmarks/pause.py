"""How long does a sync keep the engine from generating, if it is prepared?

    python -m benchmarks.pause [--model smollm2] [--schemes int8 fp8_vllm ...] [--updates 7]
                               [--clients 4] [--out benchmarks/out]

An `AsyncLLM` of each scheme, in a process of its own with its engine core in another, while
clients generate without a stop. Every update is `reload_weights(..., prepare=True)`. Inside the
engine core, in the same moments, the copy of everything that the kernels read is timed: live
memory copied to as much memory, which is what the swap would cost if it were nothing but a copy.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import os
import subprocess
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from statistics import median
from typing import Any

from benchmarks import environment, models
from benchmarks.results import described, machine, markdown, milliseconds, save_json, save_text

SCHEMES = ("bf16", "int8", "fp8_vllm", "fp8_channel")
_RESULT = "RESULT "


def copy_of_codes(worker: Any) -> list[float]:
    """Seconds to copy what this worker's kernels read, five times, and its bytes. Runs there."""
    from flashquant.patches.loading import session_of

    layers = session_of(worker.get_model())._engine.layers
    live = [t for layer in layers for _, t in layer.tensors() if t.numel()]
    copies = [t.detach().clone() for t in live]
    seconds = []
    for _ in range(5):
        start = time.perf_counter()
        for into, tensor in zip(copies, live, strict=True):
            into.copy_(tensor.detach())
        seconds.append(time.perf_counter() - start)
    return [median(seconds), float(sum(t.nbytes for t in live))]


async def measure(model: str, updates: int, clients: int) -> dict[str, Any]:
    """One engine, under load."""
    from vllm import AsyncEngineArgs, SamplingParams
    from vllm.v1.engine.async_llm import AsyncLLM

    import flashquant
    from benchmarks.pause import copy_of_codes as codes  # not of __main__: others import it too

    path = models.checkpoint(model)
    policies = models.both_policies(path)
    engine = AsyncLLM.from_engine_args(
        AsyncEngineArgs(
            str(path),
            skip_tokenizer_init=True,
            enforce_eager=True,
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
            sampling = SamplingParams(max_tokens=64, temperature=0, ignore_eos=True)
            prompt = {"prompt_token_ids": list(range(5 + number, 45 + number))}
            async for _ in engine.generate(prompt, sampling, f"{number}-{turn}"):
                tokens[0] += 1

    working = [asyncio.create_task(client(number)) for number in range(clients)]
    reports, copies, meanwhile = [], [], []
    for update in range(updates + 1):
        await asyncio.sleep(0.3)
        before = tokens[0]
        report = await flashquant.reload_weights(engine, policies[1 - update % 2], prepare=True)
        meanwhile.append(tokens[0] - before)
        (copied,) = await engine.collective_rpc(codes)
        if update:  # the first makes the plans
            reports.append(report)
            copies.append(copied)
    busy = False
    await asyncio.gather(*working)
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


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawTextHelpFormatter
    )
    parser.add_argument("--model", default="smollm2", choices=models.NAMES)
    parser.add_argument("--schemes", nargs="+", default=list(SCHEMES))
    parser.add_argument("--updates", type=int, default=7)
    parser.add_argument("--clients", type=int, default=4)
    parser.add_argument("--out", type=Path, default=Path("benchmarks/out"))
    parser.add_argument("--here", action="store_true", help=argparse.SUPPRESS)
    options = parser.parse_args(argv)
    if options.here:
        found = asyncio.run(measure(options.model, options.updates, options.clients))
        sys.stdout.write(f"{_RESULT}{json.dumps(found)}\n")
        return 0
    results = {scheme: _elsewhere(options, scheme) for scheme in options.schemes}
    header = ["scheme", "prepare", "pause", "copy", "pause / copy", "written", "tokens meanwhile"]
    table = markdown(header, [row(scheme, found) for scheme, found in results.items()])
    said = f"{options.model}, {options.clients} clients, medians of {options.updates} updates"
    text = f"{described(machine())}\n\n{said}\n\n{table}\n"
    sys.stdout.write(text)
    save_text(text, options.out / "pause.md")
    save_json(results, machine(), options.out / "pause.json")
    return 0


def _elsewhere(options: argparse.Namespace, scheme: str) -> dict[str, Any]:
    environment.prepare()
    own = {
        "FLASHRL_CONFIG": scheme,
        "VLLM_ENABLE_V1_MULTIPROCESSING": "1",
        "VLLM_ALLOW_INSECURE_SERIALIZATION": "1",  # `copy_of_codes` travels by pickle
    }
    command = [sys.executable, "-m", "benchmarks.pause", "--here", "--model", options.model]
    command += ["--updates", str(options.updates), "--clients", str(options.clients)]
    ended = subprocess.run(
        command, env={**os.environ, **own}, stdout=subprocess.PIPE, text=True, check=True
    )
    line = next(line for line in ended.stdout.splitlines() if _RESULT in line)
    found: dict[str, Any] = json.loads(line.partition(_RESULT)[2])
    return found


if __name__ == "__main__":
    raise SystemExit(main())
