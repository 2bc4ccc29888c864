"""`flashquant mismatch`: what keeps trainer and rollout apart, from logged log-probs.

flashquant mismatch FILE.jsonl [--png FILE | --no-png] [--json]
"""

from __future__ import annotations

import argparse
import json
import sys
from dataclasses import asdict
from pathlib import Path
from typing import Any

from rich.markup import escape

from flashquant.cli.output import console


def add_to(commands: argparse._SubParsersAction[Any]) -> None:
    """Add the command."""
    mismatch = commands.add_parser(
        "mismatch",
        help="say what keeps trainer and rollout apart, from logged log-probs",
        description="Says what keeps the log-probs of trainer and rollout apart: sampling that "
        "cuts off, stale weights, routing, or rounding; and draws it.",
    )
    mismatch.add_argument(
        "log", type=Path, metavar="FILE.jsonl", help="one sequence a line; docs/loss-correction.md"
    )
    mismatch.add_argument("--png", type=Path, metavar="FILE", help="default: FILE.png beside it")
    mismatch.add_argument("--no-png", action="store_true", help="draw nothing")
    mismatch.add_argument("--json", action="store_true", help="print every number as JSON")
    mismatch.set_defaults(run=_mismatch)


def _mismatch(chosen: argparse.Namespace) -> int:
    from flashquant import tis  # torch is slow to come, and other commands want none of it

    png = None if chosen.no_png else chosen.png or chosen.log.with_suffix(".png")
    found = tis.report(chosen.log, png)
    if chosen.json:
        numbers = asdict(found) | {"png": None if png is None else str(png)}
        sys.stdout.write(json.dumps(numbers, indent=2) + "\n")
        return 0
    out = console()
    out.print(escape(found.sentence), soft_wrap=True)
    out.print(f"{found.tokens} tokens, k1 {found.k1:.3g}, k3 {found.k3:.3g} nats a token")
    if png is not None:
        out.print(f"drawn: {escape(str(png))}", soft_wrap=True)
    return 0
