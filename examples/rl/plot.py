"""The picture: what each arm did, a mean over seeds and the band between its extremes."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterable
from pathlib import Path
from typing import Any

# What is drawn, with its title and whether the axis is logarithmic.
PANELS = (
    ("accuracy", "accuracy of the trainer, held out", False),
    ("reward", "reward of the rollouts", False),
    ("k3", "KL(rollout ‖ trainer), k3", True),
    ("ess", "effective sample size", False),
    ("clip_fraction", "PPO's clip in force, fraction of tokens", False),
    ("sync_seconds", "weight sync, s", True),
)
_COLUMNS = 3

Line = dict[str, Any]


def curves(lines: Iterable[Line], metric: str) -> dict[str, list[tuple[int, list[float]]]]:
    """Of each arm: its steps, and at each the values of the seeds that have one."""
    found: dict[str, dict[int, list[float]]] = defaultdict(lambda: defaultdict(list))
    for line in lines:
        if line.get(metric) is not None:
            found[line["arm"]][line["step"]].append(line[metric])
    return {arm: sorted(steps.items()) for arm, steps in found.items()}


def draw(lines: list[Line], path: Path) -> None:
    """Write the PNG."""
    from matplotlib.figure import Figure  # without pyplot: no display, no global state

    rows = -(-len(PANELS) // _COLUMNS)
    figure = Figure(figsize=(5 * _COLUMNS, 3.6 * rows), layout="constrained")
    panels = figure.subplots(rows, _COLUMNS).flat
    for axes, (metric, title, logarithmic) in zip(panels, PANELS, strict=True):
        _panel(axes, curves(lines, metric))
        axes.set_title(title)
        axes.set_xlabel("step")
        axes.grid(alpha=0.3)
        if logarithmic:
            axes.set_yscale("log")
    handles, labels = figure.axes[1].get_legend_handles_labels()
    figure.legend(handles, labels, loc="outside lower center", ncols=max(len(labels), 1))
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=110)


def _panel(axes: Any, arms: dict[str, list[tuple[int, list[float]]]]) -> None:
    for arm, points in arms.items():
        steps = [step for step, _ in points]
        middle = [sum(values) / len(values) for _, values in points]
        # An arm without its remedy is the dashed twin of the one with it.
        remedied = arm == "bf16" or "+" in arm
        (line,) = axes.plot(steps, middle, "-" if remedied else "--")
        line.set_label(arm)
        low, high = ([pick(v) for _, v in points] for pick in (min, max))
        axes.fill_between(steps, low, high, color=line.get_color(), alpha=0.15, linewidth=0)
