"""Rows of bf16 into codes in place: how near to the copy limit?

    python -m benchmarks.quantize [--shape 4096x4096 ...] [--rounds 21] [--out benchmarks/out]

The limit of one shape is the time to move three bytes a weight (two read, one written) at the
bandwidth that `copy_` of the same bf16 tensor reaches here, bytes read plus bytes written, on
all cores. Everything takes turns, round after round; medians. Codes are written into memory
that exists already, as a reload does it, wherever the function can.

    quick       what a reload calls: `flashquant.schemes.quick`
    definition  the eager torch functions, whose bits everything else must return
    vLLM        vLLM's own op on this machine, where it has one (its int8 rounds differently)
"""

from __future__ import annotations

import argparse
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from statistics import median

import torch
from torch import Tensor

from benchmarks import environment
from benchmarks.results import described, machine, markdown, save_json, save_plot, save_text
from flashquant.schemes import fp8, int8, quick, smoothed

SHAPES = ("4096x4096", "4096x11008", "8192x8192")
ACCEPTED, GOAL = 0.6, 0.8
COPY = "copy_"
SCHEMES = ("int8_channel", "int8_refreshed", "int8_frozen", "fp8_channel", "fp8_tensor")
_ROOMS = {"int8_channel": int8, "fp8_channel": fp8, "fp8_tensor": fp8}

Work = Callable[[], object]


@dataclass(frozen=True)
class Row:
    """One way to quantize one shape: seconds of each round."""

    shape: str
    scheme: str
    by: str
    rounds: list[float]
    limit: float

    @property
    def ratio(self) -> float:
        """Of the copy limit: 1 is as fast as the bytes can move."""
        return self.limit / median(self.rounds)


def measure(shape: str, rounds: int, *, slow: bool) -> list[Row]:
    """Everybody in turn, for one shape."""
    rows, columns = (int(part) for part in shape.split("x"))
    weight = torch.randn(rows, columns, generator=torch.Generator().manual_seed(0)).bfloat16()
    work: dict[tuple[str, str], Work] = {
        (COPY, "torch"): copy(weight),
        **contenders(weight),
        **vllms(weight),
    }
    seconds: dict[tuple[str, str], list[float]] = {key: [] for key in work}
    for turn in range(rounds + 2):
        for (scheme, by), call in work.items():
            if by == "definition" and (not slow or turn % 4):
                continue
            seconds[scheme, by].append(timed(call))
    # Two bytes read and two written in a copy; two and one in quantizing.
    limit = median(seconds[COPY, "torch"][2:]) * 3 / 4
    return [
        Row(shape, scheme, by, taken[1 if by == "definition" else 2 :], limit)
        for (scheme, by), taken in seconds.items()
        if len(taken) > 2
    ]


def copy(weight: Tensor) -> Work:
    into = torch.empty_like(weight)
    return lambda: into.copy_(weight)


def contenders(weight: Tensor) -> Mapping[tuple[str, str], Work]:
    """By scheme, and by what does it; on the device of the weight."""
    codes8 = torch.zeros_like(weight, dtype=torch.int8)
    codes_fp8 = torch.zeros_like(weight, dtype=torch.float8_e4m3fn)
    columns = torch.rand(weight.shape[1], device=weight.device) + 0.5
    scale = weight.float().mul(columns).abs().amax(1, keepdim=True) / 127
    factors = {"int8_frozen": (columns, scale.flatten().reciprocal())}
    factors["int8_refreshed"] = (*factors["int8_frozen"], scale)
    found: dict[tuple[str, str], Work] = {}
    for scheme in SCHEMES:
        into = codes8 if scheme.startswith("int8") else codes_fp8
        room = _ROOMS.get(scheme, smoothed)
        for by, function in (("quick", quick), ("definition", room)):
            call, extra = getattr(function, scheme), factors.get(scheme, ())
            found[scheme, by] = _bound(call, weight, extra, into)
    return found


def _bound(call: Callable[..., object], weight: Tensor, extra: tuple, into: Tensor) -> Work:
    return lambda: call(weight, *extra, into)


def vllms(weight: Tensor) -> dict[tuple[str, str], Work]:
    """Those of its CPU ops that quantize rows."""
    environment.prepare()
    import vllm._custom_ops  # noqa: F401  (registers them)

    found: dict[tuple[str, str], Work] = {}
    if hasattr(torch.ops._C, "dynamic_scaled_int8_quant"):
        int8_codes = torch.zeros(weight.shape, dtype=torch.int8)
        scales = torch.zeros(weight.shape[0], 1)
        op8 = torch.ops._C.dynamic_scaled_int8_quant
        found["int8_channel", "vLLM"] = lambda: op8(int8_codes, weight, scales, None)
    return found


def timed(call: Work) -> float:
    began = time.perf_counter()
    call()
    return time.perf_counter() - began


def table(rows: list[Row]) -> str:
    """A row a scheme and what does it, a column a shape: of the limit, and milliseconds."""
    shapes = list(dict.fromkeys(row.shape for row in rows))
    lines = []
    for scheme, by in dict.fromkeys((row.scheme, row.by) for row in rows):
        cells = []
        for shape in shapes:
            (row,) = [r for r in rows if (r.shape, r.scheme, r.by) == (shape, scheme, by)]
            cells.append(f"{row.ratio:.2f} ({_time(median(row.rounds))})")
        lines.append((scheme, by, *cells))
    return markdown(("of the copy limit", "by", *shapes), lines)


def _time(seconds: float) -> str:
    return f"{seconds * 1e6:.0f} us" if seconds < 1e-3 else f"{seconds * 1e3:.1f} ms"


def plot(rows: list[Row], path: Path) -> None:
    """A bar a way, of the largest shape; the accepted ratio and the goal as lines."""
    shape = rows[-1].shape
    mine = [row for row in rows if row.shape == shape and row.scheme != COPY]
    colors = {"quick": "#1f5f99", "definition": "#c9c9c9", "vLLM": "#ddaa88"}
    with save_plot(path, figsize=(7.5, 0.32 * len(mine) + 1.2)) as axes:
        names = [f"{row.scheme}, {row.by}" for row in mine]
        axes.barh(names, [row.ratio for row in mine], color=[colors[row.by] for row in mine])
        axes.axvline(1, color="k", linewidth=1)
        axes.axvline(ACCEPTED, color="#c0392b", linewidth=1)
        axes.invert_yaxis()
        axes.set_xlim(0, 1.1)
        axes.set_xlabel(f"of the copy limit, {shape} (red: {ACCEPTED} is accepted)")


def main(argv: list[str] | None = None) -> int:
    """Measure, print, save."""
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.quantize", description="rows of bf16 into codes, in place"
    )
    parser.add_argument("--shape", nargs="+", default=list(SHAPES))
    parser.add_argument("--rounds", type=int, default=21)
    parser.add_argument("--quick", action="store_true", help="without the slow definitions")
    parser.add_argument("--threads", type=int, help="default: all cores")
    parser.add_argument("--out", type=Path, default=Path("benchmarks/out"))
    arguments = parser.parse_args(argv)
    if arguments.threads:
        torch.set_num_threads(arguments.threads)
    found: list[Row] = []
    for shape in arguments.shape:
        found += measure(shape, arguments.rounds, slow=not arguments.quick)
        (limit,) = {row.limit for row in found if row.shape == shape}
        print(f"{shape}: the copy limit is {limit * 1e3:.2f} ms", flush=True)
    facts = machine() | {"threads": str(torch.get_num_threads())}
    text = f"{described(facts)}\n\n{table(found)}"
    print(f"\n{text}")
    save_text(text, arguments.out / "quantize.md")
    save_json(found, facts, arguments.out / "quantize.json")
    plot(found, arguments.out / "quantize.png")
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
