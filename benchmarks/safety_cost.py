"""What the undo log, the digest and the ledger cost, each as a ratio of reload time.

    python -m benchmarks.safety_cost [--model smollm2|tiny] [--rounds 7] [--out benchmarks/out]

For every scheme, engines with all proofs, without one of them, and without any live side by side
in this one process. They take turns in an order that is shuffled every round, because in a fixed
one whoever came after an engine of another scheme looked a few percent slower. A second engine
with all proofs takes turns too: its ratio should be 1.00x, and how far off it is says how much of
the others is noise.
"""

from __future__ import annotations

import argparse
import importlib.util
import json
import os
import random
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any
from unittest import mock

import torch

from benchmarks import environment, models
from benchmarks.models import Weights, both_policies
from benchmarks.results import machine, markdown, milliseconds

if TYPE_CHECKING:
    from flashquant.patches.diagnostics import Sync, Timing

SCHEMES = ("bf16", "int8", "fp8_vllm", "fp8_channel")
_NO_DIGEST = {"FLASHQUANT_DIGEST": "0"}
_NO_LEDGER = {"FLASHQUANT_LEDGER": "0"}

EVERYTHING = "everything"
# By column: the environment of an engine that goes without it, and whether it keeps an undo log.
WITHOUT: dict[str, tuple[dict[str, str], bool]] = {
    "atomic": ({}, False),
    "digest": (_NO_DIGEST, True),
    "ledger": (_NO_LEDGER, True),
    "all three": (_NO_DIGEST | _NO_LEDGER, False),
    "none (noise)": ({}, True),
}


@dataclass(frozen=True)
class Result:
    """Everything that one run found; plain data."""

    machine: dict[str, str]
    model: str
    tensors: int
    bytes: int
    threads: int
    schemes: dict[str, dict[str, Timing]]

    def ratios(self, scheme: str, without: str) -> list[float]:
        """Everything on, divided by everything but this, round by round."""
        rows = self.schemes[scheme]
        pairs = zip(rows[EVERYTHING].rounds, rows[without].rounds, strict=True)
        return [on / off for on, off in pairs]

    def ratio(self, scheme: str, without: str) -> float:
        """The same of the medians."""
        rows = self.schemes[scheme]
        return rows[EVERYTHING].median / rows[without].median


def measure(model: str, rounds: int) -> Result:
    """Start the engines, then let each take its turns."""
    path = models.checkpoint(model)
    policies = both_policies(path)
    syncs = start_engines(path)
    timings = take_shuffled_turns(syncs, policies, rounds)
    return Result(
        machine=machine(),
        model=path.name,
        tensors=len(policies[0]),
        bytes=sum(tensor.nbytes for tensor in policies[0].values()),
        threads=torch.get_num_threads(),  # vLLM decides it with the first engine
        schemes={s: {n: timings[f"{s}: {n}"] for n in (EVERYTHING, *WITHOUT)} for s in SCHEMES},
    )


def start_engines(path: Path) -> dict[str, Sync]:
    """One engine a scheme and column, ready to be reloaded, in the order of the turns."""
    import flashquant
    from flashquant.patches.diagnostics import whole

    flashquant.patch()
    arms = {EVERYTHING: ({}, True), **WITHOUT}
    return {
        f"{scheme}: {name}": whole(start_with(path, scheme, variables), atomic=atomic)
        for scheme in SCHEMES
        for name, (variables, atomic) in arms.items()
    }


def start_with(path: Path, scheme: str, variables: Mapping[str, str]) -> Any:
    """An engine whose reloads carry the proofs that these variables leave."""
    from flashquant.patches.diagnostics import start

    with mock.patch.dict(os.environ, variables):
        return start(path, scheme)


def take_shuffled_turns(
    syncs: dict[str, Sync], policies: Sequence[Weights], rounds: int
) -> dict[str, Timing]:
    """Time each once a round, in an order of that round's own, after one round nobody counts."""
    from flashquant.patches.diagnostics import Timing, timed

    dice = random.Random(0)
    seconds: dict[str, list[float]] = {name: [] for name in syncs}
    for turn in range(rounds + 1):
        for name in dice.sample(list(syncs), len(syncs)):
            seconds[name].append(timed(syncs[name], policies[(turn + 1) % 2])[0])
    return {name: Timing(name, first, rest) for name, (first, *rest) in seconds.items()}


def table(result: Result) -> str:
    """One row a scheme: the whole reload, and what each proof multiplies it by."""
    rows = [
        (
            scheme,
            milliseconds(timings[EVERYTHING].median),
            *(f"{result.ratio(scheme, name):.2f}x" for name in WITHOUT),
        )
        for scheme, timings in result.schemes.items()
    ]
    return markdown(("scheme", "whole reload", *WITHOUT), rows)


def spreads(result: Result) -> str:
    """The same round by round, from the smallest ratio to the largest."""
    rows = [
        (scheme, *(spread(result.ratios(scheme, name)) for name in WITHOUT))
        for scheme in result.schemes
    ]
    return markdown(("smallest to largest of a round", *WITHOUT), rows)


def spread(ratios: list[float]) -> str:
    return f"{min(ratios):.2f} to {max(ratios):.2f}"


def save(result: Result, out: Path) -> list[Path]:
    """Write JSON and, where matplotlib is installed, a picture."""
    out.mkdir(parents=True, exist_ok=True)
    written = out / f"safety_cost-{result.model}.json"
    written.write_text(json.dumps(asdict(result), indent=2) + "\n")
    if importlib.util.find_spec("matplotlib") is None:
        return [written]
    return [written, plot(result, written.with_suffix(".png"))]


def plot(result: Result, path: Path) -> Path:
    """One panel a scheme: a bar from 1 to the ratio of the medians, each round a dot."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(9, 5), layout="constrained")
    panels = figure.subplots(2, 2, sharex=True, sharey=True).flat
    names = list(WITHOUT)
    for axes, scheme in zip(panels, result.schemes, strict=True):
        cost = [result.ratio(scheme, name) - 1 for name in names]
        axes.barh(names, cost, left=1, color="#8fb3d9")
        for name in names:
            ratios = result.ratios(scheme, name)
            axes.plot(ratios, [name] * len(ratios), "k.", markersize=4)
        axes.axvline(1, color="0.4", linewidth=1)
        axes.spines[["top", "right"]].set_visible(False)
        on = milliseconds(result.schemes[scheme][EVERYTHING].median)
        axes.set_title(f"{scheme}, {on} a reload", fontsize=10)
    panels[0].invert_yaxis()
    figure.supxlabel("time with everything on / time without this one", fontsize=10)
    figure.suptitle(f"What each proof costs: {result.model}, {result.bytes / 1e6:.0f} MB of bf16")
    figure.savefig(path, dpi=150)
    return path


def main(argv: list[str] | None = None) -> int:
    """Measure, print, save."""
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.safety_cost", description="what each proof of a reload costs"
    )
    parser.add_argument("--model", choices=("smollm2", "tiny"), default="smollm2")
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--out", type=Path, default=Path("benchmarks/out"))
    arguments = parser.parse_args(argv)
    environment.prepare()
    print(", ".join(f"{fact}: {value}" for fact, value in machine().items()), flush=True)
    result = measure(arguments.model, arguments.rounds)
    print(f"\n{result.model}: {result.tensors} tensors, {result.bytes / 1e6:.1f} MB of bf16")
    print(f"median of {arguments.rounds} rounds, threads: {result.threads}")
    print(f"\n{table(result)}\n\n{spreads(result)}\n")
    for path in save(result, arguments.out):
        print(f"wrote {path}")
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
