"""`flashquant inspect`: where each tensor that a trainer pushes would land, and how.

flashquant inspect --model PATH [NAME] [--scheme int8] [--all] [--json] [--png FILE]

The model is created without its weights, and one layer of each kind is processed to see what
becomes of it. NAME shows the tensors and parameters that have it in their names, one by one.
"""

from __future__ import annotations

import argparse
import difflib
import json
import os
import sys
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Any

from rich.console import Console
from rich.markup import escape
from rich.table import Table

from flashquant.cli import output
from flashquant.cli.here import serve_here
from flashquant.config import env
from flashquant.errors import ConfigError

if TYPE_CHECKING:
    from flashquant.patches.diagnostics import InspectedLayer, Inspection, Line

STYLES = {
    "in place": "green",
    "whole": "cyan",
    "copied": "blue",
    "processed": "yellow",
    "loader": "magenta",
    "padding": "dim",
    "dropped": "dim",
    "refused": "bold red",
}
_MEANING = {
    "in place": "rows are written where the kernels read them",
    "whole": "written there when all of a parameter has come: its codes share a scale",
    "copied": "nothing is made of it: values are copied over the live ones",
    "processed": "packed, transposed or quantized by vLLM, on a copy of the one layer",
    "loader": "vLLM's loader does more than copy, and runs at every push",
}
_WIDE = 140  # columns that the table takes
_LEFT = (
    ("keep", "in bf16 because the entry keeps it"),
    ("tower", "in bf16 as towers of a multimodal model (quantize_towers: true quantizes them)"),
    ("router", "in bf16 as routers of a mixture"),
    ("vllm", "left in bf16 by vLLM"),
)


def add_to(commands: argparse._SubParsersAction[Any]) -> None:
    """Add the command."""
    inspect = commands.add_parser(
        "inspect",
        help="show where each tensor of a checkpoint lands, without loading it",
        description="Shows where each tensor of a checkpoint lands in the engine, in which dtype "
        "it is kept there, and how it is written. Creates the model without its weights.",
    )
    inspect.add_argument("name", nargs="?", help="part of the name of a tensor, or a parameter")
    inspect.add_argument("--model", type=Path, required=True, help="folder of a checkpoint")
    inspect.add_argument(
        "--scheme", help="what FLASHRL_CONFIG would say (default: what it says, or int8)"
    )
    inspect.add_argument("--all", action="store_true", help="every block by itself")
    inspect.add_argument("--json", action="store_true", help="for machines: everything")
    inspect.add_argument("--png", type=Path, metavar="FILE", help="also draw it (matplotlib)")
    inspect.set_defaults(run=_inspect)


def _inspect(chosen: argparse.Namespace) -> int:
    serve_here()
    scheme = chosen.scheme or env.CONFIG.read(os.environ) or "int8"
    from flashquant.patches.diagnostics import inspect_model, lines_of

    inspection = inspect_model(chosen.model, scheme)
    lines = lines_of(inspection, apart=chosen.all or chosen.name is not None)
    if chosen.name is not None:
        lines = _named(chosen.name, lines)
    if chosen.png:
        from flashquant.patches.diagnostics.picture import draw

        draw(inspection, chosen.png)
    if chosen.json:
        shown = {line.name for line in lines} if chosen.name is not None else None
        sys.stdout.write(json.dumps(_as_json(inspection, shown), indent=2) + "\n")
        return 0
    console = output.console()
    if console.width < _WIDE:
        _list(console, lines)
    else:
        console.print(_table(lines))
    if chosen.name is None:
        _summarize(console, inspection)
    else:
        _tell_layers(console, inspection, {line.target for line in lines})
    if chosen.png:
        console.print(f"{chosen.png}: the same, drawn")
    return 0


def _named(name: str, lines: Sequence[Line]) -> list[Line]:
    found = [line for line in lines if name in line.name or name in line.target]
    if not found:
        known = [line.name for line in lines]
        near = difflib.get_close_matches(name, known, n=1, cutoff=0.3)
        raise ConfigError(
            f"no tensor and no parameter has {name!r} in its name"
            + (f"; did you mean {near[0]!r}?" if near else "")
        )
    return found


def _list(console: Console, lines: Sequence[Line]) -> None:
    """What `_table` has, where its columns would cut up every name."""
    for line in lines:
        if line.how != "padding":
            alike = f", {line.alike} times" if line.alike > 1 else ""
            console.print(f"{escape(line.name)} {line.form}{alike}", highlight=False)
        window = f"\\[{line.window}]" if line.window else ""
        console.print(
            f"  -> {escape(line.target)}{window} {line.kept_as} [{STYLES[line.how]}]{line.how}[/]",
            highlight=False,
        )


def _table(lines: Sequence[Line]) -> Table:
    table = Table(box=None)
    table.add_column("tensor", overflow="fold")
    table.add_column("shape", overflow="fold")
    table.add_column("lands in", overflow="fold")
    table.add_column("window")
    table.add_column("kept as")
    table.add_column("how", no_wrap=True)
    if alike := any(line.alike > 1 for line in lines):
        table.add_column("times", justify="right")
    for line in lines:
        how = f"[{STYLES[line.how]}]{line.how}[/]"
        padded = line.how == "padding"
        table.add_row(
            "" if padded else escape(line.name),
            "" if padded else str(line.form),
            escape(line.target),
            f"\\[{line.window}]" if line.window else "",
            line.kept_as,
            how,
            *([str(line.alike)] if alike else []),
        )
    return table


def _summarize(console: Console, inspection: Inspection) -> None:

    counts = Counter(layer.how for layer in inspection.layers)
    quantized = sum(layer.quantized for layer in inspection.layers)
    console.print(
        f"\n{escape(inspection.model)}: {inspection.architecture} in {inspection.scheme} on "
        f"{inspection.device}: {len(inspection.tensors)} tensors into {len(inspection.layers)} "
        f"layers, {quantized} of them quantized",
        highlight=False,
    )
    for how, count in counts.items():
        console.print(f"  [{STYLES[how]}]{how}[/] {count}: {_MEANING[how]}", highlight=False)
    for title, names in (
        *_left_in_bf16(inspection),
        ("dropped by vLLM's loader", inspection.ignored),
        ("filled by no tensor", inspection.unfilled),
    ):
        if names:
            console.print(f"  {title}: {escape(', '.join(names))}", highlight=False)
    for tensor in inspection.tensors:
        if tensor.refused:
            console.print(f"  [bold red]refused[/]: {escape(tensor.refused)}", highlight=False)
    console.print(
        f"No weight was loaded. {len(inspection.looked_at)} layers, one a kind, were processed "
        "with random values to see what becomes of them.",
        style="dim",
    )


def _left_in_bf16(inspection: Inspection) -> Iterator[tuple[str, list[str]]]:
    """Why something is, and what."""
    from flashquant.patches.diagnostics import names_together

    for why, title in _LEFT:
        names = [name for name, because in inspection.in_bf16.items() if because == why]
        yield title, names_together(names)


def _tell_layers(console: Console, inspection: Inspection, targets: set[str]) -> None:
    """What is known of the layers that these parameters belong to."""
    for layer in inspection.layers:
        if targets & layer.parameters.keys():
            console.print(_about(layer))


def _about(layer: InspectedLayer) -> Table:
    table = Table(box=None, show_header=False, title=escape(layer.name), title_justify="left")
    table.add_row(
        "module", escape(", processed by ".join([layer.module, *layer.processed_by[-1:]]))
    )
    table.add_row("how", f"[{STYLES[layer.how]}]{layer.how}[/]: {_MEANING[layer.how]}")
    for path, form in layer.reads.items():
        table.add_row("kernels read", f"{escape(path)}: {form}")
    return table


def _as_json(inspection: Inspection, shown: set[str] | None) -> dict[str, Any]:
    """All of it, or the tensors that are shown and the layers in which they land."""
    tensors = [t for t in inspection.tensors if shown is None or t.name in shown]
    targets = {step.target for tensor in tensors for step in tensor.steps}
    layers = [
        layer for layer in inspection.layers if shown is None or targets & layer.parameters.keys()
    ]
    return {
        **asdict(inspection),
        "ignored": inspection.ignored,
        "tensors": [asdict(tensor) for tensor in tensors],
        "layers": [asdict(layer) for layer in layers],
    }
