"""Where the undo log of a reload lies, and what that costs: on the host, in the KV cache, nowhere.

    python -m benchmarks.undo [--model smollm2] [--scheme bf16 int8 fp8_vllm fp8_channel]
                              [--rounds 9] [--out benchmarks/out]

For each scheme four engines in one process: an undo log on the host (twice, so that the ratio
of the two says how much of the others is noise), in the KV cache, and none at all. They take turns
in an order that is shuffled every round; two policies alternate. A time is that of the whole call,
with what the engine core does for it: preempting requests, lending the cache, clearing it.

Afterwards each is reloaded once more, for its memory: how far the high-water mark of the process
rises (VmHWM, reset just before), with what is reserved for undo logs given back, as by an engine
that sleeps, so that it counts.
"""

from __future__ import annotations

import argparse
import multiprocessing
import os
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from statistics import median
from typing import Any
from unittest import mock

from benchmarks import contenders, environment, memory, models
from benchmarks.results import described, machine, markdown, milliseconds, save_json, save_text

SCHEMES = ("bf16", "int8", "fp8_vllm", "fp8_channel")
# By arm: FLASHQUANT_UNDO, and whether there is a log.
ARMS = {
    "none": ("host", False),
    "host": ("host", True),
    "host again": ("host", True),
    "cache": ("cache", True),
}
_CACHE = 256 << 20  # bytes: room for every log here


@dataclass(frozen=True)
class Found:
    """One arm of one scheme: seconds of each round, and bytes.

    Attributes:
        undo, cached: of the log, and of it in the KV cache.
        resident: how far resident memory rose above what it was before.

    """

    model: str
    scheme: str
    arm: str
    seconds: list[float]
    undo: int
    cached: int
    resident: int

    @property
    def median(self) -> float:
        return median(self.seconds)


def measure(model: str, scheme: str, rounds: int) -> dict[str, Found]:
    """Start an engine an arm, let them take their turns, then look at their memory."""
    environment.prepare()
    memory.give_back_at_once()
    from benchmarks.safety_cost import take_shuffled_turns
    from flashquant.patches.diagnostics import whole

    path = models.checkpoint(model)
    policies = models.both_policies(path)
    engines = {arm: start(path, scheme, place) for arm, (place, _) in ARMS.items()}
    syncs = {arm: whole(llm, atomic=ARMS[arm][1]) for arm, llm in engines.items()}
    timings = take_shuffled_turns(syncs, policies, rounds)
    found = {}
    for arm, llm in engines.items():
        contenders.session(llm).transactions.free()
        before = memory.reset_high_water_mark()
        report: Any = syncs[arm](policies[rounds % 2])
        found[arm] = Found(
            model=model,
            scheme=scheme,
            arm=arm,
            seconds=timings[arm].rounds,
            undo=report.undo_bytes,
            cached=report.undo_cache_bytes,
            resident=memory.high_water_mark() - before,
        )
    return found


def start(path: Path, scheme: str, place: str) -> Any:
    """An engine whose undo logs lie at a place."""
    import flashquant
    from flashquant.patches.diagnostics import bench

    flashquant.patch()
    with mock.patch.dict(os.environ, FLASHQUANT_UNDO=place):
        return bench.start(path, scheme, kv_cache_memory_bytes=_CACHE)


def table(found: list[dict[str, Found]]) -> str:
    """One row a scheme."""
    titles = (
        "reload",
        "no log",
        "host",
        "cache",
        "host / none",
        "cache / none",
        "cache / host",
        "noise",
        "log",
        "of it in the cache",
        "memory, none",
        "memory, host",
        "memory, cache",
    )
    return markdown(titles, [_row(arms) for arms in found])


def _row(arms: dict[str, Found]) -> tuple[str, ...]:
    none, host, again, cache = (arms[arm] for arm in ARMS)
    return (
        f"{host.model}, {host.scheme}",
        *(milliseconds(arm.median) for arm in (none, host, cache)),
        f"{host.median / none.median:.2f}x",
        f"{cache.median / none.median:.2f}x",
        f"{cache.median / host.median:.2f}x",
        f"{again.median / host.median:.2f}x",
        _mb(host.undo),
        f"{cache.cached / max(cache.undo, 1):.0%}",
        *(_mb(arm.resident) for arm in (none, host, cache)),
    )


def _mb(size: float) -> str:
    return f"{size / 1e6:.1f} MB"


def main(argv: list[str] | None = None) -> int:
    """Measure, print, save."""
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.undo", description="where the undo log lies, and what it costs"
    )
    parser.add_argument("--model", default="smollm2", choices=models.NAMES)
    parser.add_argument("--scheme", nargs="+", default=list(SCHEMES))
    parser.add_argument("--rounds", type=int, default=9)
    parser.add_argument("--out", type=Path, default=Path("benchmarks/out"))
    arguments = parser.parse_args(argv)
    models.checkpoint(arguments.model)
    spawn, found = multiprocessing.get_context("spawn"), []
    for scheme in arguments.scheme:
        with ProcessPoolExecutor(1, mp_context=spawn) as process:
            task = process.submit(measure, arguments.model, scheme, arguments.rounds)
            found.append(task.result())
        print(table(found[-1:]), flush=True)
    facts = machine()
    text = f"{described(facts)}\n\n{table(found)}"
    print(f"\n{text}")
    save_text(text, arguments.out / "undo.md")
    save_json([arm for arms in found for arm in arms.values()], facts, arguments.out / "undo.json")
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
