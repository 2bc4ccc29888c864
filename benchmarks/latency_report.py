"""Tables and pictures of `sync_latency`."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from benchmarks.results import markdown, milliseconds, save_plot

if TYPE_CHECKING:
    from flashquant.patches.diagnostics import Timing

COPY, NATIVE, OURS = "copy limit", "vLLM's own reload, bf16", "flashquant"
FLASHRL = "FlashRL's method"
_PHASES = ("plan", "quantize", "write", "commit", "digest")


@dataclass(frozen=True)
class Result:
    """What one process found; plain data. Seconds, bytes.

    Attributes:
        warm: a new engine in a process that has vLLM imported and two engines behind it.
        cold: a new process that imports vLLM and starts one.

    """

    model: str
    scheme: str
    tensors: int
    bytes: int
    threads: int
    syncs: list[Timing]
    warm: float
    cold: float


def one(result: Result) -> str:
    """All rows of one scheme, what a restart takes, and where the time goes."""
    limit, native = timing(result, COPY).median, timing(result, NATIVE).median
    rows = [
        (
            each.name,
            milliseconds(each.median),
            milliseconds(min(each.rounds)),
            f"{each.median / limit:.1f}x",
            f"{each.median / native:.2f}x",
            milliseconds(each.first),
        )
        for each in result.syncs
    ]
    for name, seconds in (("warm", result.warm), ("new", result.cold)):
        label = f"a new engine, {name} process"
        times = (f"{seconds:.2f} s", "", f"{seconds / limit:.0f}x", f"{seconds / native:.1f}x", "")
        rows.append((label, *times))
    titles = (result.scheme, "median", "fastest", "of the copy", "of vLLM's bf16", "first")
    return f"{markdown(titles, rows)}\n\n{phases(result)}"


def phases(result: Result) -> str:
    """Where the time of a whole sync of ours goes."""
    found = timing(result, OURS)
    spent = {name: found.phases.get(name, 0.0) for name in _PHASES}
    spent["the rest"] = found.median - sum(spent.values())
    parts = ", ".join(f"{name} {milliseconds(seconds)}" for name, seconds in spent.items())
    return f"Phases of `flashquant`: {parts}."


def tables(results: Sequence[Result]) -> str:
    """Everything of one model."""
    first = results[0]
    head = (
        f"{first.model}: {first.tensors:,} tensors, {first.bytes / 1e6:.1f} MB of bf16, "
        f"{first.threads} threads, median of {len(first.syncs[0].rounds)} rounds"
    )
    return "\n\n".join([head, summary(results), *(one(result) for result in results)])


def summary(results: Sequence[Result]) -> str:
    """One row a scheme: what is accepted, and what was found."""
    rows = []
    for result in results:
        ours, native = timing(result, OURS).median, timing(result, NATIVE).median
        flashrl = [each for each in result.syncs if each.name.startswith(FLASHRL)]
        rows.append(
            (
                result.scheme,
                milliseconds(ours),
                f"{ours / timing(result, COPY).median:.1f}x",
                f"{ours / native:.2f}x",
                f"1/{flashrl[0].median / ours:.1f}" if flashrl else "",
                f"1/{result.warm / ours:.0f}",
                f"1/{result.cold / ours:.0f}",
            )
        )
    titles = (
        "flashquant, whole",
        "median",
        "of the copy limit",
        "of vLLM's bf16 reload",
        "of FlashRL's method",
        "of a warm restart",
        "of a new process",
    )
    return markdown(titles, rows)


def timing(result: Result, name: str) -> Timing:
    (found,) = [each for each in result.syncs if each.name == name]
    return found


def plot(results: Sequence[Result], path: Path) -> None:
    """A group of bars a scheme: the copy, vLLM's bf16 reload, FlashRL's method, ours by phase."""
    with save_plot(path, figsize=(9, 0.9 * len(results) + 1.6)) as axes:
        for row, result in enumerate(results):
            flashrl = [each for each in result.syncs if each.name.startswith(FLASHRL)]
            bars = {
                "copy limit": timing(result, COPY),
                "vLLM's bf16 reload": timing(result, NATIVE),
            }
            bars |= {"FlashRL's method": flashrl[0]} if flashrl else {}
            colors = ("#999999", "#8fb3d9", "#ddaa88")
            for place, ((label, bar), color) in enumerate(zip(bars.items(), colors, strict=False)):
                axes.barh(
                    row - 0.3 + 0.2 * place,
                    bar.median * 1e3,
                    0.18,
                    color=color,
                    label=label if row == 0 else None,
                )
            _stack(axes, row + 0.3, result, label=row == 0)
        axes.set_yticks(range(len(results)), [result.scheme for result in results])
        axes.invert_yaxis()
        first = results[0]
        axes.set_xlabel(f"ms a sync, {first.model}, {first.bytes / 1e6:.0f} MB of bf16")
        axes.legend(fontsize=8, loc="center left", bbox_to_anchor=(1, 0.5), frameon=False)


def _stack(axes: object, row: float, result: Result, *, label: bool) -> None:
    """Our bar, in the pieces of its phases."""
    shades = ("#123b63", "#1f5f99", "#3f8fcf", "#7fbbe9", "#c9e2f6", "#e8e8e8")
    found = timing(result, OURS)
    spent = {name: found.phases.get(name, 0.0) for name in _PHASES}
    spent["the rest"] = max(0.0, found.median - sum(spent.values()))
    left = 0.0
    for (name, seconds), shade in zip(spent.items(), shades, strict=True):
        axes.barh(  # type: ignore[attr-defined]
            row,
            seconds * 1e3,
            0.18,
            left=left * 1e3,
            color=shade,
            edgecolor="#123b63",
            linewidth=0.4,
            label=f"flashquant: {name}" if label else None,
        )
        left += seconds


def plot_growth(results: Sequence[Result], path: Path) -> None:
    """Seconds over bytes, a line a scheme, the copy limit and vLLM's own reload beside them."""
    with save_plot(path, figsize=(7.5, 4.5)) as axes:
        for scheme in dict.fromkeys(result.scheme for result in results):
            mine = sorted((r for r in results if r.scheme == scheme), key=lambda r: r.bytes)
            sizes = [result.bytes / 1e6 for result in mine]
            axes.plot(sizes, [timing(r, OURS).median for r in mine], "o-", label=scheme)
        mine = sorted((r for r in results if r.scheme == results[0].scheme), key=lambda r: r.bytes)
        sizes = [result.bytes / 1e6 for result in mine]
        axes.plot(sizes, [timing(r, NATIVE).median for r in mine], "s--", color="0.5", label=NATIVE)
        axes.plot(sizes, [timing(r, COPY).median for r in mine], "k:", label=COPY)
        axes.set(xscale="log", yscale="log", xlabel="MB of bf16", ylabel="seconds a sync")
        axes.legend(fontsize=8, loc="center left", bbox_to_anchor=(1, 0.5), frameon=False)
