"""How long a weight sync takes: flashquant, vLLM's own reload, FlashRL's method, a restart.

    python -m benchmarks.sync_latency [--model smollm2 qwen2.5-0.5b ...] [--scheme int8 ...]
                                      [--rounds 5] [--out benchmarks/out]

A process a scheme. In it live flashquant's engine in that scheme, an unpatched engine in the
same scheme wherever vLLM has it, and an unpatched bf16 engine; all take turns, round after
round, so that a slow minute of the machine is everybody's, and two policies alternate. The copy
limit is `copy_` of the same bf16 tensors into memory of their own, once a turn as well. What is
timed here is not judged: where vLLM's own reload is wrong, `benchmarks.beside_vllm` says so.
"""

from __future__ import annotations

import argparse
import multiprocessing
import os
import time
from collections.abc import Iterator, Mapping
from concurrent.futures import ProcessPoolExecutor
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from benchmarks import contenders, environment, latency_report, models, restarted
from benchmarks.latency_report import Result
from benchmarks.results import described, earlier, machine, save_json, save_text
from tools.models import tiny_models

if TYPE_CHECKING:
    from flashquant.patches.diagnostics import Sync

SCHEMES = (
    *("bf16", "int8", "int8 frozen", "int8 refreshed"),
    *("fp8_vllm", "fp8_channel", "fp8_tensor", "int4", "int4_g32"),
)


def measure(model: str, scheme: str, rounds: int) -> Result:
    """One scheme; in a process of its own."""
    environment.prepare()
    import flashquant
    from flashquant.patches.diagnostics import take_turns

    flashquant.patch()
    path = models.checkpoint(model)
    policies = models.both_policies(path)
    syncs, warm = start(path, scheme, policies[0])
    timings = take_turns(syncs, policies, rounds)
    return Result(
        model=model,
        scheme=scheme,
        tensors=len(policies[0]),
        bytes=models.size(policies[0]),
        threads=torch.get_num_threads(),  # vLLM decides it with the first engine
        syncs=timings,
        warm=warm,
        cold=restarted.seconds(path, contenders.config(path, scheme)),
    )


def start(path: Path, scheme: str, weights: Mapping[str, Tensor]) -> tuple[dict[str, Sync], float]:
    """Everybody who takes a turn, by the name of the row; and what a restart takes."""
    from flashquant.patches.diagnostics import bench

    syncs = {bench.COPY_LIMIT: bench.copy_limit(weights)}
    bf16 = bench.start(path, None)
    syncs[f"{bench.NATIVE}, bf16"] = bench.native(bf16)
    syncs |= contenders.unpatched(path, scheme, bf16)
    config = contenders.config(path, scheme)
    began = time.perf_counter()
    ours = bench.start(path, config)
    warm = time.perf_counter() - began
    return syncs | contenders.flashquants(ours), warm


@contextmanager
def own_process() -> Iterator[Any]:
    """A process for one scheme, gone afterwards with its engines; its noise goes to a file."""
    spawn = multiprocessing.get_context("spawn")
    with ProcessPoolExecutor(1, mp_context=spawn, initializer=_be_quiet) as process:
        yield process


def _be_quiet() -> None:
    """Progress bars of vLLM and warnings of C++ libraries would tear the tables apart."""
    if not os.environ.get("VLLM_LOGGING_LEVEL"):
        os.dup2(os.open(os.devnull, os.O_WRONLY), 2)


def main(argv: list[str] | None = None) -> int:
    """Measure, print, save."""
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.sync_latency", description="how long a weight sync takes"
    )
    parser.add_argument("--model", nargs="+", choices=models.NAMES, default=["smollm2"])
    parser.add_argument("--scheme", nargs="+", choices=SCHEMES, default=list(SCHEMES))
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--out", type=Path, default=Path("benchmarks/out"))
    arguments = parser.parse_args(argv)
    environment.prepare()
    facts = machine()
    print(described(facts), flush=True)
    for model in arguments.model:
        file = arguments.out / f"sync_latency-{model}.json"
        results = known(file)
        tiny_models.tensors(models.checkpoint(model))  # made, and in the page cache
        for scheme in arguments.scheme:
            with own_process() as process:
                future = process.submit(measure, model, scheme, arguments.rounds)
                if (refusal := future.exception()) is not None:
                    print(f"\n{model} in {scheme}: {type(refusal).__name__}: {refusal}")
                    continue
                results[scheme] = future.result()
            print(f"\n{latency_report.one(results[scheme])}", flush=True)
        mine = [results[scheme] for scheme in SCHEMES if scheme in results]
        if mine:
            print(f"\n{latency_report.summary(mine)}")
            save_text(
                f"{described(facts)}\n\n{latency_report.tables(mine)}", file.with_suffix(".md")
            )
            save_json(mine, facts, file)
            latency_report.plot(mine, file.with_suffix(".png"))
    everything = [
        r for file in arguments.out.glob("sync_latency-*.json") for r in known(file).values()
    ]
    if len({result.model for result in everything}) > 1:
        latency_report.plot_growth(everything, arguments.out / "sync_latency-growth.png")
    return 0


def known(file: Path) -> dict[str, Result]:
    """What earlier runs found of one model, by scheme."""
    from flashquant.patches.diagnostics import Timing

    found = [
        Result(**{**each, "syncs": [Timing(**timing) for timing in each["syncs"]]})
        for each in earlier(file)
    ]
    return {result.scheme: result for result in found}


if __name__ == "__main__":
    raise SystemExit(main())
