"""`flashquant doctor`: is this machine one on which it works?

flashquant doctor            versions, seams, hardware; each kernel against its definition
flashquant doctor --engine   also serves a tiny model in each scheme, by vLLM and by flashquant
flashquant doctor --gpu      likewise on a GPU, compiled, with CUDA graphs
                             [--scheme int8] [--model qwen3-moe] [--mode graphs] [--lines]
"""

from __future__ import annotations

import argparse
import json
import os
import sys
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import asdict
from itertools import groupby
from typing import TYPE_CHECKING, Any

from rich.console import Console
from rich.markup import escape
from rich.table import Table

from flashquant.config import env
from flashquant.errors import ConfigError

if TYPE_CHECKING:
    from flashquant.patches.diagnostics import Finding

_STYLES = {"ok": "green", "skipped": "yellow", "fails": "bold red"}
_TITLES = {
    "seams": "seams: the functions of vLLM that flashquant wraps",
    "kernels": "kernels: what quantizes here, against the definition of each scheme",
}
_SECONDS = 600.0  # for one scheme
_NAMED = 3  # of those that are alike


def add_to(commands: argparse._SubParsersAction[Any]) -> None:
    """Add the command."""
    doctor = commands.add_parser(
        "doctor",
        help="look whether flashquant works on this machine",
        description="Looks whether flashquant works on this machine: versions, the functions of "
        "vLLM that it wraps (seams), hardware, schemes, and each kernel against its definition. "
        "Takes some seconds and patches nothing. The exit code is 1 where something fails. "
        "Paste its output into a bug report.",
    )
    output = doctor.add_mutually_exclusive_group()
    output.add_argument("--json", action="store_true", help="for machines: a list, at the end")
    output.add_argument(
        "--lines", action="store_true", help="for machines: a line of JSON a finding, at once"
    )
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
    doctor.add_argument("--model", default="llama", help="llama (default), qwen3-moe, deepseek-v2")
    doctor.add_argument("--mode", help="eager, graphs (captured, not compiled), or compiled")
    doctor.add_argument("--attention", help="vLLM's name of a backend, like TRITON_ATTN")
    doctor.add_argument(
        "--limit", type=float, default=_SECONDS, metavar="SECONDS", help="for a scheme (600)"
    )
    doctor.add_argument(
        "--engines-only", action="store_true", help="of --engine or --gpu nothing else"
    )
    doctor.set_defaults(run=_doctor)


def _doctor(chosen: argparse.Namespace) -> int:
    if chosen.engines_only and not (chosen.engine or chosen.gpu):
        raise ConfigError("--engines-only leaves nothing to do: add --engine or --gpu")
    findings = []
    for finding in _examined(chosen):
        findings.append(finding)
        if chosen.lines:
            sys.stdout.write(json.dumps(asdict(finding)) + "\n")
            sys.stdout.flush()
    failed = [finding for finding in findings if finding.verdict == "fails"]
    if chosen.json:
        sys.stdout.write(json.dumps([asdict(finding) for finding in findings], indent=2) + "\n")
    elif not chosen.lines:
        _show(findings, failed)
    return 1 if failed else 0


def _examined(chosen: argparse.Namespace) -> Iterator[Finding]:
    engines = _engines(chosen) if chosen.engine or chosen.gpu else ()
    if not chosen.engines_only:
        from flashquant.patches.diagnostics import examine

        yield from examine()
    yield from engines


def _engines(chosen: argparse.Namespace) -> Iterator[Finding]:
    """What was chosen is checked at once; the engines start when they are asked for."""
    from flashquant.patches.diagnostics.examination.engines import MODES, SCHEMES
    from flashquant.patches.diagnostics.examination.front import Serving, examine_engines
    from flashquant.patches.diagnostics.examination.policies import MODELS

    schemes = chosen.scheme or SCHEMES
    mode: Any = chosen.mode or ("compiled" if chosen.gpu else "eager")
    _check("scheme", schemes, SCHEMES)
    _check("model", [chosen.model], MODELS)
    _check("mode", [mode], MODES)
    progress = Console(stderr=True, soft_wrap=True)
    return examine_engines(
        Serving(chosen.model, mode, chosen.attention, chosen.limit),
        gpu=chosen.gpu,
        schemes=schemes,
        with_speed=not chosen.engines_only,
        tell=lambda line: progress.print(line, style="dim"),
    )


def _check(what: str, chosen: Sequence[str], there: Sequence[str]) -> None:
    if unknown := sorted(set(chosen) - set(there)):
        raise ConfigError(
            f"there is no {what} {', '.join(unknown)}; choose from {', '.join(there)}"
        )


def _show(findings: Sequence[Finding], failed: Sequence[Finding]) -> None:
    console = Console()
    for topic, group in groupby(findings, key=lambda finding: finding.topic):
        if topic == "verdict":  # in one line, to be pasted
            for finding in group:
                console.print(finding.detail, soft_wrap=True, markup=False, highlight=False)
        else:
            console.print(_table(topic, group))
        console.print()
    if failed:
        console.print(f"[bold red]{len(failed)} of {len(findings)} fail[/]: see above what to do")
    else:
        console.print(f"[green]all is well[/] ({len(findings)} looked at)")
    name, said = env.CONFIG.name, env.CONFIG.read(os.environ)
    console.print(
        f"{name} is {escape(said)}: flashquant config says what engines here make of it"
        if said
        else f"{name} is not set: engines that start here are vLLM's own"
    )


def _table(topic: str, findings: Iterable[Finding]) -> Table:
    table = Table(
        title=_TITLES.get(topic, topic), title_justify="left", box=None, show_header=False
    )
    table.add_column()
    table.add_column(overflow="fold")
    table.add_column()
    for alike in _alike(findings):
        style = _STYLES[alike[0].verdict]
        verdict = f"[{style}]{alike[0].verdict}[/]"
        table.add_row(verdict, escape(_names(alike)), escape(alike[0].detail))
    return table


def _alike(findings: Iterable[Finding]) -> Iterator[list[Finding]]:
    """Those of which the same is to be said, together: a person reads it once."""
    together: dict[tuple[str, str], list[Finding]] = {}
    for finding in findings:
        together.setdefault((finding.verdict, finding.detail), []).append(finding)
    yield from together.values()


def _names(alike: Sequence[Finding]) -> str:
    names = [finding.name for finding in alike]
    left = len(names) - _NAMED
    return ", ".join(names) if left <= 0 else f"{names[0]} and {len(names) - 1} more"
