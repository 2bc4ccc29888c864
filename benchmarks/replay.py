"""What a reload costs beside its tensor work: microseconds a tensor, up to 20,000 tensors.

    python -m benchmarks.replay [--layout fused experts] [--dtype bfloat16 int8]
                                [--tensors 200 2000 20000] [--profile FILE] [--out benchmarks/out]

A model of tiny tensors, and no engine: all that takes time is the road itself (plan lookup,
checks, dispatch, transactions), into layers that are written where they lie. From the time of a
reload is taken the time of the bare tensor work: the same quantize calls, the same copies into
the same live memory, with the old values kept where the reload keeps an undo log, in a tight
loop. What is left, divided by the number of incoming tensors, is the overhead. Checks for NaN
count as overhead. Times are those of the CPU, of the one thread that runs.
"""

from __future__ import annotations

import argparse
import cProfile
import functools
import gc
import pstats
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from statistics import median
from types import MappingProxyType, SimpleNamespace
from typing import Any

import torch
from torch import Tensor, nn

from benchmarks.results import described, machine, markdown, save_json, save_plot, save_text
from flashquant.config.checks import Checks
from flashquant.schemes import int8_channel
from flashquant.update import Session, UndoLog, WhyInBf16

ROWS, COLUMNS = 8, 64
LIMIT = 10.0  # microseconds a tensor: the acceptance
# Tensors that a layer gathers: gate and up of a dense model; 128 experts of three of a sparse one.
LAYOUTS = {"fused": 2, "experts": 384}
DTYPES = {"bfloat16": torch.bfloat16, "int8": torch.int8}
PROOFS = {"all proofs": (True, True), "no undo log": (False, True), "no proofs": (False, False)}


class Engine:
    """Layers that gather `shards` tensors each, one below the other, in one parameter."""

    device, shares_scales = torch.device("cpu"), False
    tied: Mapping[str, str] = MappingProxyType({})
    optional: frozenset[str] = frozenset()
    in_bf16: Mapping[str, WhyInBf16] = MappingProxyType({})
    overrides: Mapping[str, str] = MappingProxyType({})
    cache_scales = SimpleNamespace(
        contents=lambda: iter(()), set=lambda scales, undo: None, restore=lambda: None
    )

    def __init__(self, tensors: int, shards: int, dtype: torch.dtype) -> None:
        self.scheme, self.shards = "int8" if dtype == torch.int8 else "bf16", shards
        self.layers = tuple(
            _layer(f"layers.{index}", shards, dtype) for index in range(max(1, tensors // shards))
        )
        self.live = {name: live for layer in self.layers for name, live in layer.homes.items()}
        self.targets = {name: live.to("meta") for name, live in self.live.items()}
        self.stored = self.targets
        self._under: Mapping[str, Tensor] = self.live

    def weights(self, seed: int) -> dict[str, Tensor]:
        """What a trainer pushes, in the order of the model."""
        dice = torch.Generator().manual_seed(seed)
        return {
            f"layers.{index}.{shard}.weight": torch.randn(ROWS, COLUMNS, generator=dice).bfloat16()
            for index in range(len(self.layers))
            for shard in range(self.shards)
        }

    def home(self, name: str) -> tuple[str, int]:
        """The parameter that a tensor lands in, and its first row there."""
        _, layer, shard, kind = name.split(".")  # kind: weight, or weight_scale
        return f"layers.{layer}.{kind}", int(shard) * ROWS

    def make_anew(self, undo: UndoLog) -> None:
        """Its modules keep nothing."""

    def load(self, weights: Iterator[tuple[str, Tensor]]) -> None:
        for name, loaded in weights:
            target, row = self.home(name)
            self._under[target].narrow(0, row, ROWS).copy_(loaded)

    @contextmanager
    def laid_out(self, values: Mapping[str, Tensor] | None = None) -> Iterator[None]:
        kept, self._under = self._under, {**self.targets, **(values or {})}
        try:
            yield
        finally:
            self._under = kept


@dataclass(frozen=True)
class Point:
    """One model: seconds of its reload, and of the bare work in it."""

    layout: str
    dtype: str
    proofs: str
    tensors: int
    reload: float
    bare: float

    @property
    def overhead(self) -> float:
        """Microseconds a tensor."""
        return (self.reload - self.bare) / self.tensors * 1e6


def _layer(name: str, shards: int, dtype: torch.dtype) -> Any:
    """A layer that is written where it lies, as the row-major kernels of a GPU have them."""
    from flashquant.patches.layers import InPlaceLayer, LayerBlueprint

    module = nn.Module()
    values = {"weight": torch.zeros(shards * ROWS, COLUMNS, dtype=dtype)}
    if dtype == torch.int8:
        values["weight_scale"] = torch.zeros(shards * ROWS, 1)
    for key, value in values.items():
        module.register_parameter(key, nn.Parameter(value, requires_grad=False))
    blueprint = LayerBlueprint(
        name=name,
        module=module,
        attributes={},
        parameters={key: value.to("meta") for key, value in values.items()},
        targets={key: f"{name}.{key}" for key in values},
    )
    return InPlaceLayer(
        blueprint, {f"{name}.{key}": p.detach() for key, p in module.named_parameters()}
    )


def measure(layout: str, dtype: str, tensors: int, rounds: int) -> Iterator[Point]:
    """Reload and bare work in turn, medians; one model for all kinds of proofs."""
    session, engine = serving(layout, dtype, tensors)
    policies = [engine.weights(seed) for seed in (1, 2)]
    session.reload(policies[1])  # learns the plan
    for proofs, (atomic, checked) in PROOFS.items():
        session.proofs.checks = Checks(ledger=checked, digest=checked)
        work = bare_work(engine, keep=atomic)
        reload, bare = [], []
        for turn in range(rounds):
            weights = policies[turn % 2]
            bare.append(timed(functools.partial(work, weights)))
            reload.append(timed(functools.partial(session.reload, weights, atomic=atomic)))
        yield Point(layout, dtype, proofs, len(policies[0]), median(reload), median(bare))


def serving(layout: str, dtype: str, tensors: int) -> tuple[Session, Engine]:
    """A session whose engine has loaded its first policy."""
    engine = Engine(tensors, LAYOUTS[layout], DTYPES[dtype])
    session = Session(engine)
    with torch.no_grad():
        learn_at_once(session, engine.weights(0))
        session.first_load(iter(engine.weights(0).items()))
    session.open()
    return session, engine


def learn_at_once(session: Session, weights: Mapping[str, Tensor]) -> None:
    """Trace all names, those of scales too, in one run of the loader.

    A first load and a first push in int8 trace one after the other, and each looks at every
    parameter: minutes, of which the reloads after it, which this is about, know nothing.
    """
    scale = torch.empty(ROWS, 1)
    for name, tensor in weights.items():
        session._planner.note(name, tensor)
        if session._engine.scheme == "int8":
            session._planner.note(f"{name}_scale", scale)
    session._planner.of(*next(iter(weights.items())))
    unknown = [name for name in weights if name not in session.plan]
    if unknown:
        raise AssertionError(f"{unknown[0]} was not learned with the others")


def bare_work(engine: Engine, *, keep: bool) -> Callable[[Mapping[str, Tensor]], object]:
    """The quantize calls and the copies of a reload, and nothing else, in a tight loop."""
    jobs = []
    for name in engine.weights(0):
        target, row = engine.home(name)
        codes = engine.live[target].narrow(0, row, ROWS)
        scale = engine.live.get(f"{target}_scale")
        jobs.append((name, codes, None if scale is None else scale.narrow(0, row, ROWS)))

    def work(weights: Mapping[str, Tensor]) -> list[Tensor]:
        kept: list[Tensor] = []
        for name, codes, scale in jobs:
            if keep:
                kept.append(codes.clone())
            if scale is None:
                codes.copy_(weights[name])
                continue
            if keep:
                kept.append(scale.clone())
            _, scales = int8_channel(weights[name], codes)
            scale.copy_(scales)
        return kept

    return torch.no_grad()(work)


def timed(work: Callable[[], object]) -> float:
    """Seconds of CPU: it is one thread's work, and what others run at the time is not its cost."""
    gc.collect()
    began = time.process_time()
    work()
    return time.process_time() - began


def profile(layout: str, dtype: str, tensors: int, path: Path) -> None:
    """Where the time of one reload goes, by function, to a text file."""
    session, engine = serving(layout, dtype, tensors)
    weights = engine.weights(1)
    session.reload(weights)
    profiler = cProfile.Profile()
    profiler.runcall(session.reload, weights)
    with path.open("a") as file:
        file.write(f"=== {layout}, {dtype}, {tensors} tensors, atomic, ledger, digest ===\n")
        stats = pstats.Stats(profiler, stream=file).strip_dirs()
        stats.sort_stats("tottime").print_stats(45)
        stats.sort_stats("cumulative").print_stats(45)


def table(points: list[Point]) -> str:
    """One row a model."""
    rows = [
        (
            f"{point.layout}, {point.dtype}, {point.proofs}",
            f"{point.tensors:,}",
            f"{point.reload * 1e3:.1f} ms",
            f"{point.bare * 1e3:.1f} ms",
            f"{point.overhead:.1f} µs",
        )
        for point in points
    ]
    return markdown(("model", "tensors", "reload", "bare work", "overhead a tensor"), rows)


def plot(points: list[Point], path: Path) -> None:
    """Overhead a tensor over the number of tensors, a line a kind."""
    with save_plot(path, figsize=(8, 4.5)) as axes:
        for layout, dtype, proofs in dict.fromkeys((p.layout, p.dtype, p.proofs) for p in points):
            mine = [p for p in points if (p.layout, p.dtype, p.proofs) == (layout, dtype, proofs)]
            marker = {"fused": "o", "experts": "s"}[layout]
            line = dict(zip(PROOFS, ("-", "--", ":"), strict=True))[proofs]
            axes.plot(
                [point.tensors for point in mine],
                [point.overhead for point in mine],
                f"{marker}{line}",
                color={"bfloat16": "#4477aa", "int8": "#cc6677"}[dtype],
                label=f"{layout}, {dtype}, {proofs}",
            )
        axes.axhline(LIMIT, color="0.3", linewidth=1, label=f"accepted: {LIMIT:.0f} µs")
        axes.set(xscale="log", xlabel="tensors in one reload", ylabel="µs a tensor beyond the work")
        axes.set_ylim(bottom=0)
        axes.legend(fontsize=8, loc="center left", bbox_to_anchor=(1, 0.5), frameon=False)


def main(argv: list[str] | None = None) -> int:
    """Measure, print, save."""
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.replay", description="what a reload costs beside its tensor work"
    )
    parser.add_argument("--layout", nargs="+", choices=LAYOUTS, default=list(LAYOUTS))
    parser.add_argument("--dtype", nargs="+", choices=DTYPES, default=list(DTYPES))
    parser.add_argument("--tensors", nargs="+", type=int, default=[400, 2_000, 6_000, 20_000])
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--profile", type=Path, help="cProfile of the largest, appended to a file")
    parser.add_argument("--out", type=Path, default=Path("benchmarks/out"))
    arguments = parser.parse_args(argv)
    torch.set_num_threads(1)  # tiny tensors: a second thread costs more than it brings
    if arguments.profile:
        for layout in arguments.layout:
            for dtype in arguments.dtype:
                profile(layout, dtype, max(arguments.tensors), arguments.profile)
        return 0
    points: list[Point] = []
    for layout in arguments.layout:
        for dtype in arguments.dtype:
            for tensors in arguments.tensors:
                found = list(measure(layout, dtype, tensors, arguments.rounds))
                points += found
                print(table(found), flush=True)
    facts = machine()
    text = f"{described(facts)}\n\n{table(points)}"
    print(f"\n{text}")
    save_text(text, arguments.out / "replay.md")
    save_json(points, facts, arguments.out / "replay.json")
    plot(points, arguments.out / "replay.png")
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
