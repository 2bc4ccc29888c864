"""How long a weight sync takes, beside vLLM's own reload and the copy of the same bytes.

    python -m benchmarks.sync_latency [--model smollm2|tiny] [--rounds 5] [--out benchmarks/out]

Every contender lives in this one process and all take turns, round after round, so that a
slow minute of the machine is everybody's. The two policies alternate. The copy limit is
`copy_` of the same bf16 tensors into memory of their own: read each byte once, write it once.
"""

from __future__ import annotations

import argparse
import gc
import importlib.util
import json
import os
import platform
import tempfile
import time
from collections.abc import Callable, Iterable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from statistics import median
from typing import Any
from unittest import mock

import torch
from torch import Tensor

from benchmarks import environment
from examples.demo import smollm2
from tests import tiny_models

SCHEMES = ("bf16", "int8", "fp8_vllm", "fp8_channel")
COPY_LIMIT = "copy limit"
NATIVE = "vLLM's own reload, bf16"

Weights = dict[str, Tensor]
Sync = Callable[[Weights], object]


@dataclass(frozen=True)
class Timing:
    """One row: how long a sync took, in seconds.

    Attributes:
        first: the very first one, with what is learned only once (write plans, kernels).
        rounds: each one after it.

    """

    name: str
    first: float
    rounds: list[float]

    @property
    def median(self) -> float:
        return median(self.rounds)


@dataclass(frozen=True)
class Result:
    """Everything that one run found; plain data."""

    machine: dict[str, str]
    model: str
    tensors: int
    bytes: int
    threads: int
    syncs: list[Timing]
    restarts: dict[str, float]


def measure(model: str, rounds: int) -> Result:
    """Start the engines, then sync each in turn."""
    with tempfile.TemporaryDirectory() as folder:
        path = checkpoint(model, Path(folder))
        policies = both_policies(path)
        engines, restarts = start_engines(path, Path(folder))
        timings = take_turns(contenders(engines, policies[0]), policies, rounds)
    return Result(
        machine=machine(),
        model=path.name,
        tensors=len(policies[0]),
        bytes=sum(tensor.nbytes for tensor in policies[0].values()),
        threads=torch.get_num_threads(),  # vLLM decides it with the first engine
        syncs=timings,
        restarts=restarts,
    )


def checkpoint(model: str, folder: Path) -> Path:
    """SmolLM2-135M as the demo converts it, or a random Llama of two layers."""
    if model == "smollm2":
        return smollm2.checkpoint(smollm2.default_cache_dir())
    return tiny_models.make("llama", 0, folder / "tiny-llama")


def both_policies(path: Path) -> tuple[Weights, Weights]:
    """What the engine starts on, and the same after a step of two percent."""
    weights = {name: tensor.clone() for name, tensor in tiny_models.tensors(path).items()}
    return weights, {name: (tensor * 1.02).to(tensor.dtype) for name, tensor in weights.items()}


def start_engines(path: Path, folder: Path) -> tuple[dict[str, Any], dict[str, float]]:
    """One engine a contender and the seconds each took to start.

    The first engine of a process pays for imports and global state, and none of
    these should: a tiny one goes ahead. vLLM wants all of them kept alive.
    """
    import flashquant

    flashquant.patch()
    engines = {"": start(tiny_models.make("llama", 1, folder / "first"), None)}
    seconds: dict[str, float] = {}
    for name in (NATIVE, *SCHEMES):
        began = time.perf_counter()
        engines[name] = start(path, None if name == NATIVE else name)
        seconds[name] = time.perf_counter() - began
    return engines, seconds


def start(path: Path, config: str | None) -> Any:
    """An engine as a trainer starts it; without FLASHRL_CONFIG, flashquant leaves it alone."""
    from vllm import LLM

    with mock.patch.dict(os.environ, {} if config is None else {"FLASHRL_CONFIG": config}):
        return LLM(
            str(path),
            skip_tokenizer_init=True,
            enforce_eager=True,
            kv_cache_memory_bytes=16 << 20,
            max_model_len=128,
            dtype="bfloat16",
        )


def contenders(engines: dict[str, Any], weights: Weights) -> dict[str, Sync]:
    """Every way to bring the weights somewhere, by the name of its row."""
    syncs: dict[str, Sync] = {COPY_LIMIT: copy_limit(weights), NATIVE: native(engines[NATIVE])}
    for scheme in SCHEMES:
        llm = engines[scheme]
        syncs[f"{scheme}: whole"] = whole(llm, atomic=True)
        syncs[f"{scheme}: whole, atomic=False"] = whole(llm, atomic=False)
        syncs[f"{scheme}: one tensor a call"] = tensor_by_tensor(llm)
    return syncs


def copy_limit(weights: Weights) -> Sync:
    """`copy_` into memory that exists already, tensor by tensor."""
    live = {name: tensor.clone() for name, tensor in weights.items()}

    def sync(weights: Weights) -> None:
        for name, tensor in weights.items():
            live[name].copy_(tensor)

    return sync


def native(llm: Any) -> Sync:
    """vLLM's layerwise reload of an engine that flashquant does not look after."""

    def sync(weights: Weights) -> None:
        llm.collective_rpc("reload_weights", kwargs={"weights_iterator": iter(weights.items())})

    return sync


def whole(llm: Any, *, atomic: bool) -> Sync:
    """One call for everything, with undo log or without."""
    import flashquant

    def sync(weights: Weights) -> object:
        return flashquant.reload_weights(llm, weights, atomic=atomic)

    return sync


def tensor_by_tensor(llm: Any) -> Sync:
    """`model.load_weights` as most trainers call it: without a beginning and an end."""
    model = llm.apply_model(lambda model: model)[0]

    def sync(weights: Weights) -> None:
        for pair in weights.items():
            model.load_weights([pair])

    return sync


def take_turns(syncs: dict[str, Sync], policies: Sequence[Weights], rounds: int) -> list[Timing]:
    """Time A B C A B C ..., after one turn that nobody counts."""
    seconds: dict[str, list[float]] = {name: [] for name in syncs}
    for turn in range(rounds + 1):
        for name, sync in syncs.items():
            seconds[name].append(timed(sync, policies[(turn + 1) % 2]))
    return [Timing(name, first, rest) for name, (first, *rest) in seconds.items()]


def timed(sync: Sync, weights: Weights) -> float:
    """Seconds of one sync, without a garbage collection that another one made necessary."""
    gc.collect()
    began = time.perf_counter()
    sync(weights)
    return time.perf_counter() - began


def machine() -> dict[str, str]:
    """What a number from here must be read with."""
    import vllm

    return {
        "cpu": cpu_model(),
        "cores": str(len(os.sched_getaffinity(0))),
        "AMX": "yes" if torch.cpu._is_amx_tile_supported() else "no",
        "torch": torch.__version__,
        "vllm": vllm.__version__,
    }


def cpu_model() -> str:
    """The name in /proc/cpuinfo, or whatever Python knows."""
    cpuinfo = Path("/proc/cpuinfo")
    lines = cpuinfo.read_text().splitlines() if cpuinfo.exists() else []
    names = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
    return names[0] if names else platform.processor() or platform.machine()


def table(result: Result) -> str:
    """The syncs in markdown, the limit first."""
    medians = {timing.name: timing.median for timing in result.syncs}
    rows = [
        (
            timing.name,
            milliseconds(timing.median),
            milliseconds(min(timing.rounds)),
            f"{timing.median / medians[COPY_LIMIT]:.1f}x",
            f"{timing.median / medians[NATIVE]:.2f}x",
            milliseconds(timing.first),
        )
        for timing in result.syncs
    ]
    titles = ("sync", "median", "fastest", "of the copy limit", "of vLLM's own", "first")
    return markdown(titles, rows)


def restart_table(result: Result) -> str:
    """What a trainer without a sync pays: a new engine, in a process that is warm."""
    own = {timing.name.partition(":")[0]: timing.median for timing in reversed(result.syncs)}
    rows = [
        (name, f"{seconds:.2f} s", f"{seconds / own[name]:.1f}x")
        for name, seconds in result.restarts.items()
    ]
    return markdown(("engine restart", "seconds", "of its sync"), rows)


def markdown(titles: tuple[str, ...], rows: Iterable[tuple[str, ...]]) -> str:
    """A table: first column to the left, numbers to the right."""
    lines = [titles, (":--", *["--:"] * (len(titles) - 1)), *rows]
    return "\n".join(f"| {' | '.join(cells)} |" for cells in lines)


def milliseconds(seconds: float) -> str:
    return f"{seconds * 1e3:.1f} ms"


def save(result: Result, out: Path) -> list[Path]:
    """Write JSON and, where matplotlib is installed, a picture."""
    out.mkdir(parents=True, exist_ok=True)
    written = out / f"sync_latency-{result.model}.json"
    written.write_text(json.dumps(asdict(result), indent=2) + "\n")
    if importlib.util.find_spec("matplotlib") is None:
        return [written]
    return [written, plot(result, written.with_suffix(".png"))]


def plot(result: Result, path: Path) -> Path:
    """Bars of the medians, each round a dot, the copy limit a line."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(8, 0.35 * len(result.syncs) + 1), layout="constrained")
    axes = figure.subplots()
    names = [timing.name for timing in result.syncs]
    axes.barh(names, [timing.median * 1e3 for timing in result.syncs], color="#8fb3d9")
    for timing in result.syncs:
        dots = [seconds * 1e3 for seconds in timing.rounds]
        axes.plot(dots, [timing.name] * len(dots), "k.", markersize=3)
    axes.axvline(result.syncs[0].median * 1e3, color="#c0392b", linewidth=1)
    axes.invert_yaxis()
    axes.set_xlabel(f"ms, {result.model}, {result.bytes / 1e6:.0f} MB of bf16")
    figure.savefig(path, dpi=150)
    return path


def main(argv: list[str] | None = None) -> int:
    """Measure, print, save."""
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.sync_latency", description="how long a weight sync takes"
    )
    parser.add_argument("--model", choices=("smollm2", "tiny"), default="smollm2")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--out", type=Path, default=Path("benchmarks/out"))
    arguments = parser.parse_args(argv)
    environment.prepare()
    print(", ".join(f"{fact}: {value}" for fact, value in machine().items()), flush=True)
    result = measure(arguments.model, arguments.rounds)
    print(f"\n{result.model}: {result.tensors} tensors, {result.bytes / 1e6:.1f} MB of bf16")
    print(f"median of {arguments.rounds} rounds, {result.threads} threads")
    print(f"\n{table(result)}\n\n{restart_table(result)}\n")
    for path in save(result, arguments.out):
        print(f"wrote {path}")
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
