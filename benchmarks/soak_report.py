"""What a soak found: tables in markdown, JSON and a picture."""

from __future__ import annotations

import importlib.util
import json
from dataclasses import asdict, dataclass
from pathlib import Path
from statistics import fmean, quantiles

from benchmarks.results import markdown, milliseconds
from benchmarks.trend import Trend, trend

WARM_UP = 0.2  # of all reloads, left out of the slope
ACCEPTED = 0.1  # percent an hour

_GOOD, _BAD = "#2c5f8a", "#c0392b"


@dataclass(frozen=True)
class Result:
    """Everything that one soak found; plain data, one number a reload in each series.

    Attributes:
        clock: seconds since the loop began, when the reload and its digest were done.
        rss: resident memory then, in bytes.
        seconds: what the call of `flashquant.reload_weights` took.
        faults: what was injected, or None for a good reload.
        raised: by fault, which errors came of it and how often.
        moved: live tensors whose address, shape, stride or dtype is not what it was.

    """

    machine: dict[str, str]
    model: str
    scheme: str
    seed: int
    threads: int
    tensors: int
    moved: list[str]
    violations: list[str]
    raised: dict[str, dict[str, int]]
    faults: list[str | None]
    clock: list[float]
    seconds: list[float]
    rss: list[int]

    @property
    def warm(self) -> int:
        """The first reload that counts for the slope."""
        return round(len(self.rss) * WARM_UP)

    @property
    def resident(self) -> float:
        """Mean resident memory after the warm-up, in bytes."""
        return fmean(self.rss[self.warm :])

    def which(self, *, failed: bool) -> list[int]:
        """The numbers of the reloads that failed, or of those that did not."""
        return [n for n, fault in enumerate(self.faults) if (fault is not None) == failed]

    def slopes(self) -> dict[str, Trend]:
        """Growth of resident memory in percent an hour, of this loop and of a calm trainer."""
        rss, clock = self.rss[self.warm :], self.clock[self.warm :]
        percent = 100 / self.resident
        return {
            "an hour of this loop": trend(clock, rss).times(3600 * percent),
            "an hour at one sync a minute": trend(range(len(rss)), rss).times(60 * percent),
        }


def tables(result: Result) -> str:
    """Everything there is to know about one soak, in markdown."""
    return "\n\n".join((summary(result), fault_table(result), latencies(result), memory(result)))


def summary(result: Result) -> str:
    """What happened, and what never may."""
    warm = result.rss[result.warm :]
    return markdown(
        ("soak", ""),
        [
            ("reloads", f"{len(result.faults):,}"),
            ("of them made to fail", str(len(result.which(failed=True)))),
            ("violations", str(len(result.violations))),
            ("live tensors moved", f"{len(result.moved)} of {result.tensors}"),
            ("wall time", f"{result.clock[-1]:.1f} s"),
            ("resident memory, first reload", megabytes(result.rss[0])),
            (f"after reload {result.warm}, least", megabytes(min(warm))),
            (f"after reload {result.warm}, most", megabytes(max(warm))),
            ("last reload", megabytes(result.rss[-1])),
        ],
    )


def fault_table(result: Result) -> str:
    """What was injected, and what the caller got to see."""
    rows = [
        (fault, str(result.faults.count(fault)), ", ".join(f"{n} {e}" for e, n in seen.items()))
        for fault, seen in result.raised.items()
    ]
    return markdown(("fault, at a random tensor", "injected", "raised"), rows)


def latencies(result: Result) -> str:
    """How long the call took, when it went through and when it did not."""
    rows = []
    for name, failed in (("good", False), ("failed, rolled back", True)):
        seconds = [result.seconds[number] for number in result.which(failed=failed)]
        if len(seconds) > 1:
            cuts = quantiles(seconds, n=100, method="inclusive")
            rows.append((name, *map(milliseconds, (cuts[49], cuts[98], max(seconds)))))
    return markdown(("reload", "p50", "p99", "slowest"), rows)


def memory(result: Result) -> str:
    """Whether resident memory grows, seen as two kinds of hour."""
    rows = [
        (hour, f"{slope:+.4f} %", f"{error:.4f} %", verdict(slope, error))
        for hour, (slope, error) in result.slopes().items()
    ]
    titles = ("slope of resident memory", "percent", "standard error", f"<= {ACCEPTED} %")
    return markdown(titles, rows)


def verdict(slope: float, error: float) -> str:
    """Yes and no are sure by two standard errors."""
    if slope + 2 * error <= ACCEPTED:
        return "yes"
    return "no" if slope - 2 * error > ACCEPTED else "cannot tell"


def megabytes(size: float) -> str:
    return f"{size / 1e6:.2f} MB"


def save(result: Result, out: Path) -> list[Path]:
    """Write JSON and, where matplotlib is installed, a picture."""
    out.mkdir(parents=True, exist_ok=True)
    written = out / f"soak-{result.model}-{result.scheme}.json"
    written.write_text(json.dumps(asdict(result)) + "\n")
    if importlib.util.find_spec("matplotlib") is None:
        return [written]
    return [written, plot(result, written.with_suffix(".png"))]


def plot(result: Result, path: Path) -> Path:
    """Resident memory over the reloads, and below it how long each of them took."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(9, 6), layout="constrained")
    above, below = figure.subplots(2, sharex=True, height_ratios=(2, 3))
    above.plot([rss / 1e6 for rss in result.rss], color=_GOOD, linewidth=1.4)
    above.axvspan(0, result.warm, color="0.94", label="warm-up, left out of the slope")
    above.set_ylabel("resident memory, MB")
    above.legend(loc="lower right", frameon=False)
    for label, failed, colour in (("good", False, _GOOD), ("failed and rolled back", True, _BAD)):
        numbers = result.which(failed=failed)
        milliseconds = [result.seconds[number] * 1e3 for number in numbers]
        below.plot(numbers, milliseconds, ".", color=colour, label=label, markersize=4, alpha=0.7)
    below.set_ylabel("time of the call, ms")
    below.set_xlabel("reload")
    below.set_xlim(0, len(result.rss))
    below.set_ylim(0, max(result.seconds) * 1.15e3)  # room for the legend
    below.legend(loc="upper right", ncols=2, frameon=False)
    for axes in (above, below):
        axes.spines[["top", "right"]].set_visible(False)
        axes.grid(axis="y", color="0.9", linewidth=0.6)
        axes.set_axisbelow(True)
    figure.suptitle(title(result))
    figure.savefig(path, dpi=150)
    return path


def title(result: Result) -> str:
    failed = len(result.which(failed=True))
    return (
        f"{len(result.rss):,} reloads of one live engine ({result.model}, {result.scheme}), "
        f"{failed} made to fail, {len(result.violations)} violations"
    )
