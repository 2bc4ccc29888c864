"""`flashquant` on the command line.

flashquant doctor [--json]                    is this machine one on which it works?
flashquant profile make|inspect|compare|convert    int8 profiles: see `cli_profile`
flashquant bench --model PATH                 how long does a sync take here? see `cli_bench`

The exit code is 0, or 1 where something fails.
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Sequence
from dataclasses import asdict
from itertools import groupby
from typing import TYPE_CHECKING

from rich.console import Console
from rich.markup import escape
from rich.table import Table

from flashquant import cli_bench, cli_profile
from flashquant.errors import FlashquantError

if TYPE_CHECKING:
    from flashquant.patches.doctor import Finding

_STYLES = {"ok": "green", "skipped": "yellow", "fails": "bold red"}


def main(arguments: Sequence[str] | None = None) -> int:
    """Run one command; 0 when all is well."""
    parser = argparse.ArgumentParser(prog="flashquant", description="fp8 and int8 rollouts in vLLM")
    commands = parser.add_subparsers(dest="command", required=True)
    doctor = commands.add_parser("doctor", help="look whether flashquant works on this machine")
    doctor.add_argument("--json", action="store_true", help="for machines")
    doctor.set_defaults(run=lambda chosen: _doctor(as_json=chosen.json))
    cli_profile.add_to(commands)
    cli_bench.add_to(commands)
    chosen = parser.parse_args(arguments)
    try:
        code: int = chosen.run(chosen)
        return code
    except FlashquantError as error:
        Console(stderr=True, soft_wrap=True).print(f"[bold red]error[/]: {escape(str(error))}")
        return 1


def _doctor(*, as_json: bool) -> int:
    from flashquant.patches.doctor import examine

    findings = examine()
    failed = [finding for finding in findings if finding.verdict == "fails"]
    if as_json:
        sys.stdout.write(json.dumps([asdict(finding) for finding in findings], indent=2) + "\n")
    else:
        _show(findings, failed)
    return 1 if failed else 0


def _show(findings: Sequence[Finding], failed: Sequence[Finding]) -> None:
    console = Console()
    for topic, group in groupby(findings, key=lambda finding: finding.topic):
        table = Table(title=topic, title_justify="left", box=None, show_header=False)
        table.add_column()
        table.add_column(overflow="fold")
        table.add_column()
        for finding in group:
            style = _STYLES[finding.verdict]
            table.add_row(f"[{style}]{finding.verdict}[/]", finding.name, finding.detail)
        console.print(table)
        console.print()
    if failed:
        console.print(f"[bold red]{len(failed)} of {len(findings)} fail[/]: see above what to do")
    else:
        console.print(f"[green]all is well[/] ({len(findings)} looked at)")
