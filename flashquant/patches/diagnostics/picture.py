"""An inspection as a picture: tensors of the checkpoint on the left, the engine's on the right."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any, Final

from flashquant.errors import ConfigError
from flashquant.patches.diagnostics.inspected import Inspection
from flashquant.patches.diagnostics.lines import Line, lines_of

_COLORS: Final = {
    "in place": "#2e8b57",
    "whole": "#2a9d9d",
    "copied": "#4a78b5",
    "processed": "#d98e04",
    "loader": "#a03c8c",
    "dropped": "#9a9a9a",
    "refused": "#c0392b",
}
_MEANING: Final = {
    "in place": "in place: written where the kernels read it",
    "whole": "whole: the same, when all of a parameter is there",
    "copied": "copied: nothing is made of it",
    "processed": "processed: by vLLM, on a copy of the layer",
    "loader": "loader: vLLM's loader runs at every push",
    "dropped": "dropped by vLLM's loader",
    "refused": "refused by vLLM's loader",
}
_LEFT, _RIGHT = (0.0, 0.40), (0.56, 1.0)  # the columns of boxes
_HIGH = 0.72  # of a box, where 1 is the distance between two


def draw(inspection: Inspection, path: Path) -> None:
    """Draw the write plan into a PNG: one box a tensor, or for all that differ in numbers only.

    Raises:
        ConfigError: matplotlib is not installed.

    """
    try:
        from matplotlib.figure import Figure
    except ImportError as missing:
        raise ConfigError(
            f"--png needs matplotlib ({missing}); install flashquant[bench], or leave --png out"
        ) from missing
    lines = [line for line in lines_of(inspection) if line.how != "padding"]
    targets = list(dict.fromkeys(line.target for line in lines if line.target))
    order = {target: index for index, target in enumerate(targets)}
    lines.sort(key=lambda line: (order.get(line.target, len(order)), line.span))
    names = list(dict.fromkeys(line.name for line in lines))
    rows = max(len(names), len(targets))
    figure: Any = Figure(figsize=(13, 1.8 + 0.52 * rows), layout="constrained")
    axes: Any = figure.subplots()
    left = {name: _place(i, len(names), rows) for i, name in enumerate(names)}
    right = {target: _place(i, len(targets), rows) for i, target in enumerate(targets)}
    for line in lines:
        _draw_tensor(axes, line, left[line.name])
        if line.target:
            _draw_way(axes, line, left[line.name], right[line.target])
    for target in targets:
        first = next(line for line in lines if line.target == target)
        _draw_target(axes, first, right[target])
    _finish(axes, inspection, lines, rows)
    figure.savefig(path, dpi=130)


def _place(index: int, count: int, rows: int) -> float:
    """The middle of a box, counted from the top; the shorter column is spread over the longer."""
    return -(index + 0.5) * rows / count


def _draw_tensor(axes: Any, line: Line, at: float) -> None:
    _draw_box(axes, _LEFT, at, _COLORS[line.how], alpha=0.05)
    _write(axes, _LEFT[0], at, line.name, str(line.form), line.alike)


def _draw_target(axes: Any, line: Line, at: float) -> None:
    _draw_box(axes, _RIGHT, at, _COLORS[line.how], alpha=0.16)
    shape = "" if line.whole is None else " x ".join(map(str, line.whole.shape))
    _write(axes, _RIGHT[0], at, line.target, f"{line.kept_as} {shape}", line.alike)


def _draw_box(axes: Any, column: tuple[float, float], at: float, color: str, alpha: float) -> None:
    from matplotlib.patches import Rectangle

    corner, width = (column[0], at - _HIGH / 2), column[1] - column[0]
    axes.add_patch(Rectangle(corner, width, _HIGH, facecolor=color, alpha=alpha))
    axes.add_patch(Rectangle(corner, width, _HIGH, fill=False, edgecolor=color))


def _draw_way(axes: Any, line: Line, at: float, to: float) -> None:
    """A band from a tensor to the part of a parameter that it fills."""
    from matplotlib.patches import PathPatch
    from matplotlib.path import Path as Outline

    color, (x0, x1) = _COLORS[line.how], (_LEFT[1], _RIGHT[0])
    top0, low0 = at + _HIGH / 2, at - _HIGH / 2
    top1, low1 = (to + _HIGH / 2 - part * _HIGH for part in line.span)
    middle = (x0 + x1) / 2
    upper = [(x0, top0), (middle, top0), (middle, top1), (x1, top1)]
    lower = [(x1, low1), (middle, low1), (middle, low0), (x0, low0)]
    curve = [Outline.CURVE4] * 3
    codes = [Outline.MOVETO, *curve, Outline.LINETO, *curve, Outline.CLOSEPOLY]
    outline = Outline([*upper, *lower, upper[0]], codes)
    axes.add_patch(PathPatch(outline, facecolor=color, alpha=0.35, linewidth=0))
    axes.plot((_RIGHT[1] - 0.05, _RIGHT[1]), (low1, low1), color=color, linewidth=0.8)


def _write(axes: Any, x: float, y: float, name: str, form: str, alike: int) -> None:
    times = f"  ({alike} times)" if alike > 1 else ""
    axes.text(x + 0.006, y + 0.14, name, fontsize=8, va="center", family="monospace")
    axes.text(x + 0.006, y - 0.17, f"{form}{times}", fontsize=7, va="center", color="#555555")


def _finish(axes: Any, inspection: Inspection, lines: Sequence[Line], rows: int) -> None:
    from matplotlib.patches import Patch

    used = dict.fromkeys(line.how for line in lines)
    handles = [Patch(color=_COLORS[how], label=_MEANING[how]) for how in used]
    axes.legend(
        handles=handles, loc="upper center", bbox_to_anchor=(0.5, 0), ncols=2, frameon=False
    )
    axes.set_title(
        f"{Path(inspection.model).name} ({inspection.architecture}) in {inspection.scheme} on "
        f"{inspection.device}: what a trainer sends, and where it lands"
    )
    axes.set_xlim(-0.01, 1.01)
    axes.set_ylim(-rows - 0.1, 0.1)
    axes.axis("off")
