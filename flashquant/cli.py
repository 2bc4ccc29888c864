"""`flashquant` on the command line.

flashquant doctor [--json]                         is this machine one on which it works?
flashquant profile inspect PROFILE                 what an int8 profile holds
flashquant profile convert OLD NEW [--model W8A8]  FlashRL's profile.pt becomes ours

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

from flashquant.errors import FlashquantError

if TYPE_CHECKING:
    from torch import Tensor

    from flashquant.patches.doctor import Finding
    from flashquant.profiles import Profile

_STYLES = {"ok": "green", "skipped": "yellow", "fails": "bold red"}


def main(arguments: Sequence[str] | None = None) -> int:
    """Run one command; 0 when all is well."""
    parser = argparse.ArgumentParser(prog="flashquant", description="fp8 and int8 rollouts in vLLM")
    commands = parser.add_subparsers(dest="command", required=True)
    doctor = commands.add_parser("doctor", help="look whether flashquant works on this machine")
    doctor.add_argument("--json", action="store_true", help="for machines")
    _add_profile(commands)
    chosen = parser.parse_args(arguments)
    try:
        return _run(chosen)
    except FlashquantError as error:
        Console(stderr=True, soft_wrap=True).print(f"[bold red]error[/]: {escape(str(error))}")
        return 1


def _add_profile(commands: argparse._SubParsersAction[argparse.ArgumentParser]) -> None:
    profile = commands.add_parser("profile", help="look at int8 profiles, and convert them")
    verbs = profile.add_subparsers(dest="verb", required=True)
    inspect = verbs.add_parser("inspect", help="what a profile holds")
    inspect.add_argument("profile", help="a path, or owner/repo/file@revision")
    convert = verbs.add_parser("convert", help="FlashRL's profile.pt becomes ours")
    convert.add_argument("old", help="a path, or owner/repo/file@revision")
    convert.add_argument("new", help="a path that ends in .safetensors")
    convert.add_argument(
        "--model", help="folder of the W8A8 checkpoint: check that they fit, and note which it is"
    )
    convert.add_argument("--revision", help="of the model's repository, to be noted")


def _run(chosen: argparse.Namespace) -> int:
    if chosen.command == "doctor":
        return _doctor(as_json=chosen.json)
    if chosen.verb == "inspect":
        return _inspect_profile(chosen.profile)
    return _convert_profile(chosen.old, chosen.new, chosen.model, chosen.revision)


def _convert_profile(old: str, new: str, model: str | None, revision: str | None) -> int:
    from flashquant.calibration import check_profile_fits
    from flashquant.profiles import load_profile, save_profile, with_base
    from flashquant.weights import named_tensors

    profile = load_profile(old)
    if model is not None:
        check_profile_fits(profile, named_tensors(model))
        profile = with_base(profile, model, revision, named_tensors(model))
    save_profile(profile, new)
    Console().print(f"{new}: {len(profile.entries)} weights, of {_base_of(profile)}")
    return 0


def _inspect_profile(reference: str) -> int:
    from flashquant.profiles import load_profile

    profile = load_profile(reference)
    table = Table("weight", "stored as", "shape", "columns", "rows", box=None)
    for name, entry in profile.entries.items():
        shape = " x ".join("?" if size is None else str(size) for size in entry.shape)
        kind = str(entry.kind).removeprefix("torch.")
        table.add_row(name, kind, shape, _span(entry.input_scale), _span(entry.output_scale))
    console = Console()
    console.print(table)
    console.print(f"\n{profile.source}: {len(profile.entries)} weights, of {_base_of(profile)}")
    return 0


def _base_of(profile: Profile) -> str:
    if profile.base is None:
        return "a checkpoint that nobody noted (convert it with --model)"
    revision = f"@{profile.base.revision}" if profile.base.revision else ""
    return f"{profile.base.model}{revision}, {len(profile.base.fingerprint)} fingerprints"


def _span(factors: Tensor | None) -> str:
    """The smallest, the middle and the largest of them."""
    if factors is None:
        return "1"
    return " … ".join(f"{f.item():.3g}" for f in (factors.min(), factors.median(), factors.max()))


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
