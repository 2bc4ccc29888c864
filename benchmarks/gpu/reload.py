"""A whole reload of one model: flashquant, vLLM's own, the copy of its bytes, a restart.

One process holds vLLM's engine in bf16 and, scheme by scheme, flashquant's and vLLM's online one;
the pushed tensors lie on the device. All take turns, round after round. vLLM's reload is timed
here, not judged.
"""

from __future__ import annotations

import functools
import os
import time
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any
from unittest.mock import patch

import torch
from torch import Tensor

from benchmarks import environment, restarted
from benchmarks.gpu.facts import Facts
from benchmarks.gpu.modes import MODES, generate
from benchmarks.results import markdown, milliseconds
from flashquant.config import env

if TYPE_CHECKING:
    from flashquant.patches.diagnostics import Sync, Timing

SCHEMES = ("bf16", "int8", "fp8_vllm", "fp8_channel", "fp8_block")
TITLES = ("reload", "median", "fastest", "of the copy", "of vLLM's bf16", "GB/s", "first")

_SMALLEST_CACHE = 16 << 20  # bytes: of a rehearsal


def checkpoint_bytes(path: Path) -> int:
    """As much as any undo log of a model: a cache that is smaller than that would not hold one."""
    return sum(file.stat().st_size for file in path.glob("*.safetensors"))


class Engines:
    """Those that take turns, as they are started; one that does not start is left out."""

    def __init__(self, path: Path, mode: str, facts: Facts) -> None:
        self._path, self._mode, self._facts = path, mode, facts
        self.syncs: dict[str, Sync] = {}
        self.starts: dict[str, float] = {}
        self._engines: dict[str, Any] = {}

    def add_vllms(self, scheme: str) -> bool:
        """vLLM's own engine: in bf16, or in one of its online schemes; whether it serves that."""
        from flashquant.config.schemes import ONLINE
        from flashquant.patches.diagnostics import bench

        online = {"quantization": ONLINE[scheme]} if scheme in ONLINE else {}
        name = f"{bench.NATIVE}, {ONLINE.get(scheme, 'bf16')}"
        try:
            llm = self._start(name, None, online)
        except Exception as failure:  # whatever it is, it is not ours
            said = " ".join(str(failure).split())[:200]
            self._facts.tell(name, f"vLLM alone does not serve it here: {said}", "skipped")
            return False
        self.syncs[name] = bench.native(llm)
        return True

    def add_ours(self, scheme: str) -> None:
        """flashquant's engine, with its undo log and without; one that has the log on the host."""
        from flashquant.patches.diagnostics import bench

        size = {"kv_cache_memory_bytes": max(_SMALLEST_CACHE, checkpoint_bytes(self._path))}
        name = f"flashquant, {scheme}"
        llm = self._facts.guarded(f"start of {name}", lambda: self._start(name, scheme, size))
        if llm is not None:
            self.syncs[name] = bench.whole(llm, atomic=True)
            self.syncs[f"{name}, no undo log"] = bench.whole(llm, atomic=False)
        name = f"flashquant, {scheme}, undo log on the host"
        with patch.dict(os.environ, {env.UNDO.name: "host"}):
            llm = self._facts.guarded(f"start of {name}", lambda: self._start(name, scheme, {}))
        if llm is not None:
            self.syncs[name] = bench.whole(llm, atomic=True)

    def _start(self, name: str, scheme: str | None, options: Mapping[str, Any]) -> Any:
        from flashquant.patches.diagnostics import bench

        began = time.perf_counter()
        llm = bench.start(self._path, scheme, **MODES[self._mode], **options)
        self.starts[name] = time.perf_counter() - began
        self._facts.tell(f"start of {name}", f"{self.starts[name]:.1f} s")
        generate(llm)
        self._engines[name] = llm
        return llm

    def generate(self) -> None:
        """All that started still do."""
        for name, llm in self._engines.items():
            self._facts.guarded(
                f"generation after the reloads, {name}", functools.partial(generate, llm)
            )


def measure(
    path: Path, schemes: Sequence[str], mode: str, rounds: int, device: torch.device, facts: Facts
) -> tuple[list[Timing], dict[str, float], int]:
    """Timings, seconds of each engine's start in this process, and bytes of what is pushed."""
    environment.prepare()
    import flashquant
    from flashquant.config.schemes import ONLINE
    from flashquant.patches.diagnostics import bench
    from flashquant.plan import named_tensors

    flashquant.patch()
    weights = {name: tensor.to(device) for name, tensor in named_tensors(path)}
    engines = Engines(path, mode, facts)
    engines.syncs[bench.COPY_LIMIT] = bench.copy_limit(weights)
    engines.add_vllms("bf16")  # the first, so that it pays for what is global
    for scheme in schemes:
        if scheme not in ONLINE or engines.add_vllms(scheme):
            engines.add_ours(scheme)
    timings = bench.take_turns(engines.syncs, [weights], rounds, lost=facts.fails)
    engines.generate()
    return timings, engines.starts, _bytes(weights)


def _bytes(weights: Mapping[str, Tensor]) -> int:
    return sum(tensor.nbytes for tensor in weights.values())


def rows(timings: Sequence[Timing], starts: Mapping[str, float], size: int) -> Iterator[list[str]]:
    """The table: what was timed, then what starts took."""
    by_name = {timing.name: timing.median for timing in timings}
    copy = timings[0].median
    native = next((s for name, s in by_name.items() if name.endswith(", bf16")), float("nan"))
    for timing in timings:
        seconds = timing.median
        yield [
            timing.name,
            milliseconds(seconds),
            milliseconds(min(timing.rounds)),
            f"{seconds / copy:.1f}x",
            f"{seconds / native:.2f}x",
            f"{size / seconds / 1e9:.1f}",
            milliseconds(timing.first),
        ]
    for name, seconds in starts.items():
        ratios = [f"{seconds / copy:.0f}x", f"{seconds / native:.0f}x"]
        yield [f"start of {name}", f"{seconds:.1f} s", "", *ratios, "", ""]


def run(
    path: Path,
    schemes: Sequence[str],
    mode: str,
    rounds: int,
    device: torch.device,
    facts: Facts,
    out: Path,
) -> None:
    """Measure, tell, keep."""
    timings, starts, size = measure(path, schemes, mode, rounds, device, facts)
    _tell(timings, list(rows(timings, {}, size)), facts)  # now: a new process takes its time
    if served := [scheme for scheme in schemes if f"flashquant, {scheme}" in starts]:
        cold = facts.guarded("a new process", lambda: restarted.seconds(path, served[-1], mode))
        if cold is not None:
            facts.tell("a new process", f"{served[-1]}, {cold:.1f} s until it has generated")
            starts[f"flashquant, {served[-1]}, in a new process"] = cold
    lines = list(rows(timings, starts, size))
    if device.type == "cuda":
        facts.tell("GPU memory", f"{torch.cuda.max_memory_allocated() / 1e9:.1f} GB at most")
    found = {"timings": timings, "starts": starts, "bytes": size, "mode": mode}
    head = f"{path.name}, {size / 1e6:,.1f} MB of bf16 on {device}, {mode}, {rounds} rounds"
    facts.keep(found, f"{head}\n\n{markdown(TITLES, lines)}", out)


def _tell(timings: Sequence[Timing], lines: Sequence[Sequence[str]], facts: Facts) -> None:
    """Starts have been told."""
    for line in lines:
        facts.tell(
            line[0], ", ".join(f"{t} {v}" for t, v in zip(TITLES[1:], line[1:], strict=True) if v)
        )
    for timing in timings:
        if timing.phases:
            parts = ", ".join(f"{name} {milliseconds(s)}" for name, s in timing.phases.items())
            facts.tell(f"phases of {timing.name}", parts)
