"""Pictures: how strongly a profile smooths, and what layers cost."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Container, Sequence
from typing import TYPE_CHECKING, Any, Final

import torch
from torch import Tensor

from flashquant.errors import ProfileError
from flashquant.profiles.profile import Profile

if TYPE_CHECKING:
    from flashquant.profiles.making.sensitivity import Cost

_LEAST: Final = 1e-9  # of what is drawn on a logarithmic axis


def draw(profile: Profile, path: str) -> None:
    """Draw one profile into a PNG.

    A line is a layer, from its least to its largest channel, the point its middle one. Above,
    what columns are multiplied by; below, what a code of a row is worth. Blocks from left to right.

    Raises:
        ProfileError: matplotlib is not installed.

    """
    figure = _figure(11, 7.5)
    above, below = figure.subplots(2, 1, sharex=True)
    kinds: dict[str, list[tuple[int, Tensor, Tensor]]] = defaultdict(list)
    blocks: dict[str, int] = {}
    none = torch.ones(1, device="cpu")
    for name, entry in profile.entries.items():
        if entry.kind == torch.int8:
            block, kind = _parted(name)
            columns = none if entry.input_scale is None else entry.input_scale
            rows = none if entry.output_scale is None else 1 / entry.output_scale
            kinds[kind].append((blocks.setdefault(block, len(blocks)), columns, rows))
    for index, (kind, found) in enumerate(sorted(kinds.items())):
        shift = (index - len(kinds) / 2) * 0.8 / len(kinds)
        at = [block + shift for block, _, _ in found]
        columns_of = [columns for _, columns, _ in found]
        rows_of = [rows for _, _, rows in found]
        for axes, spans in ((above, columns_of), (below, rows_of)):
            low, high = [float(s.min()) for s in spans], [float(s.max()) for s in spans]
            axes.vlines(at, low, high, color=f"C{index}", linewidth=1, alpha=0.6)
            middle = [float(s.median()) for s in spans]
            axes.plot(at, middle, "o", color=f"C{index}", markersize=3, label=kind)
    above.set_ylabel("factor of a column\n(least, middle, largest)")
    below.set_ylabel("worth of a code of a row\n(least, middle, largest)")
    below.set_xlabel("block")
    for axes in (above, below):
        axes.set_yscale("log", base=2)
        axes.grid(alpha=0.3)
    above.set_title(f"{profile.source}: {len(profile.entries)} weights")
    above.legend(fontsize="small", ncols=4)
    figure.savefig(path, dpi=120)


def draw_costs(costs: Sequence[Cost], keep: Container[str], title: str, path: str) -> None:
    """Draw what each layer costs into a PNG: blocks from left to right, a line a kind of layer.

    Args:
        costs: layers that are computed as one, and what they cost.
        keep: names of the layers that are kept, which get a ring.
        title: of the picture.
        path: of the PNG.

    Raises:
        ProfileError: matplotlib is not installed.

    """
    figure = _figure(11, 5)
    axes = figure.subplots()
    kinds: dict[str, list[tuple[int, float, bool]]] = defaultdict(list)
    blocks: dict[str, int] = {}
    for cost in costs:
        block, _ = _parted(cost.layers[0])
        kind = ", ".join(_parted(name)[1] for name in cost.layers)
        at = blocks.setdefault(block, len(blocks))
        kinds[kind].append((at, max(cost.kl, _LEAST), cost.layers[0] in keep))
    for index, (kind, found) in enumerate(sorted(kinds.items())):
        places, costly, _ = zip(*found, strict=True)
        axes.plot(places, costly, "o-", color=f"C{index}", markersize=4, linewidth=1, label=kind)
    ringed = [(at, kl) for found in kinds.values() for at, kl, kept in found if kept]
    if ringed:
        axes.plot(*zip(*ringed, strict=True), "ko", markersize=10, fillstyle="none", label="kept")
    axes.set_yscale("log")
    axes.set_xlabel("block")
    axes.set_ylabel("KL to bf16 with these layers alone quantized\n(nats a token)")
    axes.grid(alpha=0.3)
    axes.set_title(title)
    axes.legend(fontsize="small")
    figure.savefig(path, dpi=120)


def _figure(width: float, height: float) -> Any:
    try:
        from matplotlib.figure import Figure
    except ImportError as missing:
        raise ProfileError(f"matplotlib is needed to draw: {missing}") from missing
    return Figure(figsize=(width, height), layout="constrained")


def _parted(name: str) -> tuple[str, str]:
    """`model.layers.3.mlp.up_proj.weight` -> (`model.layers.3`, `mlp.up_proj`)."""
    parts = name.removesuffix(".weight").split(".")
    end = next((i + 1 for i, part in enumerate(parts) if part.isdigit()), 0)
    return ".".join(parts[:end]), ".".join(parts[end:])
