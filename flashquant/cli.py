"""`flashquant` on the command line.

flashquant doctor [--engine|--gpu] [--json]   is this machine one on which it works?
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
from flashquant.errors import ConfigError, FlashquantError

if TYPE_CHECKING:
    from flashquant.patches.doctor import Finding

_STYLES = {"ok": "green", "skipped": "yellow", "fails": "bold red"}


def main(arguments: Sequence[str] | None = None) -> int:
    """Run one command; 0 when all is well."""
    parser = argparse.ArgumentParser(prog="flashquant", description="fp8 and int8 rollouts in vLLM")
    commands = parser.add_subparsers(dest="command", required=True)
    doctor = commands.add_parser("doctor", help="look whether flashquant works on this machine")
    doctor.add_argument("--json", action="store_true", help="for machines")
    engines = doctor.add_mutually_exclusive_group()
    engines.add_argument(
        "--engine", action="store_true", help="also serve a tiny model in each scheme, eagerly"
    )
    engines.add_argument(
        "--gpu", action="store_true", help="the same on a GPU, compiled, with CUDA graphs"
    )
    doctor.add_argument(
        "--scheme", action="append", help="only this one; may be given more than once"
    )
    doctor.set_defaults(run=_doctor)
    cli_profile.add_to(commands)
    cli_bench.add_to(commands)
    chosen = parser.parse_args(arguments)
    try:
        code: int = chosen.run(chosen)
        return code
    except FlashquantError as error:
        Console(stderr=True, soft_wrap=True).print(f"[bold red]error[/]: {escape(str(error))}")
        return 1


def _doctor(chosen: argparse.Namespace) -> int:
    from flashquant.patches.doctor import examine

    findings = examine()
    if chosen.engine or chosen.gpu:
        findings += _examine_engines(chosen)
    failed = [finding for finding in findings if finding.verdict == "fails"]
    if chosen.json:
        sys.stdout.write(json.dumps([asdict(finding) for finding in findings], indent=2) + "\n")
    else:
        _show(findings, failed)
    return 1 if failed else 0


def _examine_engines(chosen: argparse.Namespace) -> list[Finding]:
    from flashquant.patches.examination.engines import SCHEMES
    from flashquant.patches.examination.front import examine_engines

    schemes = chosen.scheme or SCHEMES
    if unknown := sorted(set(schemes) - set(SCHEMES)):
        raise ConfigError(
            f"there is no scheme {', '.join(unknown)}; choose from {', '.join(SCHEMES)}"
        )
    progress = Console(stderr=True, soft_wrap=True)
    return examine_engines(
        gpu=chosen.gpu,
        compiled=chosen.gpu,
        schemes=schemes,
        tell=lambda line: progress.print(line, style="dim"),
    )


def _show(findings: Sequence[Finding], failed: Sequence[Finding]) -> None:
    console = Console()
    for topic, group in groupby(findings, key=lambda finding: finding.topic):
        table = Table(title=topic, title_justify="left", box=None, show_header=False)
        table.add_column()
        table.add_column(overflow="fold")
        table.add_column()
        for finding in group:
            style = _STYLES[finding.verdict]
            verdict = f"[{style}]{finding.verdict}[/]"
            table.add_row(verdict, escape(finding.name), escape(finding.detail))
        if topic == "verdict":  # in one line, to be pasted
            console.print(finding.detail, soft_wrap=True, markup=False, highlight=False)
        else:
            console.print(table)
        console.print()
    if failed:
        console.print(f"[bold red]{len(failed)} of {len(findings)} fail[/]: see above what to do")
    else:
        console.print(f"[green]all is well[/] ({len(findings)} looked at)")
