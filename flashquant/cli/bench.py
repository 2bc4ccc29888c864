"""`flashquant bench`: how long a weight sync of your model takes on your machine.

flashquant bench --model PATH [--scheme int8] [--rounds 5] [--json FILE]
"""

from __future__ import annotations

import argparse
import json
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Any

from rich.console import Console
from rich.table import Table

from flashquant.cli.here import serve_here
from flashquant.errors import ConfigError

if TYPE_CHECKING:
    from flashquant.patches.diagnostics import Result


def add_to(commands: argparse._SubParsersAction[Any]) -> None:
    """Add the command."""
    bench = commands.add_parser(
        "bench",
        help="time a weight sync beside vLLM's own and the copy of its bytes",
        description="Times a weight sync of your model, with random weights, beside vLLM's own "
        "reload and the copy of its bytes. Starts an engine: use a machine that is idle.",
    )
    bench.add_argument("--model", type=Path, required=True, help="folder of a bf16 checkpoint")
    bench.add_argument("--scheme", default="int8", help="what FLASHRL_CONFIG would say")
    bench.add_argument("--rounds", type=int, default=5, help="turns that count (default 5)")
    bench.add_argument("--json", type=Path, metavar="FILE", help="write every number to a file")
    bench.set_defaults(run=_bench)


def _bench(chosen: argparse.Namespace) -> int:
    if chosen.rounds < 1:
        raise ConfigError(f"--rounds {chosen.rounds}: at least one turn has to count")
    if not (chosen.model / "config.json").is_file():
        raise ConfigError(f"{chosen.model} is no folder of a checkpoint: it has no config.json")
    serve_here()
    from flashquant.patches.diagnostics import measure

    result = measure(chosen.model, chosen.scheme, chosen.rounds)
    _show(result)
    if chosen.json:
        chosen.json.write_text(json.dumps(asdict(result), indent=2) + "\n")
    return 0


def _show(result: Result) -> None:
    console = Console()
    console.print(
        f"{result.model}: {result.tensors} tensors, {result.bytes / 1e6:.1f} MB of bf16, on "
        f"{result.device}, {result.threads} threads; median of {len(result.syncs[0].rounds)} rounds"
    )
    table = Table(box=None)
    table.add_column("sync", overflow="fold")
    for title in ("median", "fastest", "x copy", "x vLLM", "first"):
        table.add_column(title, justify="right")
    limit, native = (timing.median for timing in result.syncs[:2])
    for timing in result.syncs:
        table.add_row(
            timing.name,
            _ms(timing.median),
            _ms(min(timing.rounds)),
            f"{timing.median / limit:.1f}x",
            f"{timing.median / native:.2f}x",
            _ms(timing.first),
        )
    start = result.start
    table.add_row("a new engine", _ms(start), "", f"{start / limit:.1f}x", f"{start / native:.2f}x")
    console.print(table)
    for timing in result.syncs:
        if timing.phases:
            parts = ", ".join(f"{phase} {_ms(spent)}" for phase, spent in timing.phases.items())
            console.print(f"{timing.name}: {parts}")
    console.print("vLLM's own reload is timed, not judged: see docs/performance.md.")


def _ms(seconds: float) -> str:
    return f"{seconds * 1e3:.1f} ms"
