"""Everything that a GPU can say of flashquant, and a page to paste."""

from __future__ import annotations

import argparse
import json
import os
import shlex
import shutil
import sys
import tempfile
import time
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path

from benchmarks.gpu import scratch
from tools.gpu import environment, unpack
from tools.gpu.page import Fact, page, verdict
from tools.gpu.runner import Runner
from tools.gpu.steps import chosen, steps

_PROJECT = Path(__file__).parents[2]
# Programs at a time. One alone had its first engine after 33 s on an H200's host of 16 cores, 17 at
# once after 65 s on one day and after 184 s on another: none of them had told anything by then.
_JOBS = 6
_LOG = 120_000  # characters kept of one program's log


def main(argv: Sequence[str] | None = None) -> int:
    """0 where nothing failed."""
    options = _options(argv)
    options.work.mkdir(parents=True, exist_ok=True)
    every = steps(options.device, options.work, scratch.folder())
    found = chosen(every, options.only, options.skip)
    if options.list:
        print("\n".join(f"{step.name:<36} at most {step.seconds} s" for step in found))
        return 0
    try:
        env = _environment(options)
    except unpack.Damaged as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    if options.env:
        print(environment.shell(env))
        return 0
    return _run(found, env, options)


def _options(argv: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="python -m tools.gpu", description=__doc__)
    parser.add_argument("--parts", nargs="+", type=Path, default=[], metavar="part-N.tar")
    parser.add_argument("--device", choices=("cuda", "cpu"), default="cuda")
    parser.add_argument("--only", nargs="+", default=[], metavar="STEP", help="that begin so")
    parser.add_argument("--skip", nargs="+", default=[], metavar="STEP", help="that begin so")
    parser.add_argument("--list", action="store_true", help="the steps, and their limits")
    parser.add_argument("--budget", type=float, default=480, metavar="SECONDS", help="(480)")
    parser.add_argument("--jobs", type=int, help="programs at a time where none measures")
    parser.add_argument("--work", type=Path, default=_work(), metavar="FOLDER")
    parser.add_argument("--out", type=Path, default=_out(), metavar="FOLDER", help="for the page")
    parser.add_argument("--env", action="store_true", help="print the environment, for a shell")
    return parser.parse_args(argv)


def _work() -> Path:
    return Path(tempfile.gettempdir()) / "flashquant-gpu"


def _out() -> Path:
    """Where a lent machine says that files come back from; else beside the logs."""
    return Path(os.environ["OUT"]) if os.environ.get("OUT") else _work() / "report"


def _environment(options: argparse.Namespace) -> dict[str, str]:
    """With parts, of the kit, which is unpacked now or was before; else of what is installed."""
    site, on_cpu = options.work / "site", options.device == "cpu"
    for line in unpack.unpack(options.parts, site) if options.parts else ():
        print(line, file=sys.stderr, flush=True)
    if not options.parts and not site.exists():
        return environment.online(_PROJECT, on_cpu=on_cpu)
    print(unpack.install(_PROJECT, site), file=sys.stderr)
    return environment.offline(_PROJECT, site, options.work, on_cpu=on_cpu)


def _run(found: list, env: dict[str, str], options: argparse.Namespace) -> int:
    logs, on_cpu = options.work / "logs", options.device == "cpu"
    for folder in (logs, options.work / "tables"):
        shutil.rmtree(folder, ignore_errors=True)
        folder.mkdir()
    options.out.mkdir(parents=True, exist_ok=True)
    runner = Runner(
        env,
        logs,
        budget=options.budget,
        jobs=options.jobs or (1 if on_cpu else min(_JOBS, os.cpu_count() or 1)),
        tell=_say,
    )
    try:
        runner.run(found)
    finally:
        shutil.rmtree(scratch.folder(), ignore_errors=True)
        _keep(runner, options)
    print(f"\n{(options.out / 'report.md').read_text()}")
    print(f"{verdict(runner.facts)}; {options.out}/report.md, facts.json, all.log, tables.json")
    return 1 if any(fact.verdict in ("fails", "late") for fact in runner.facts) else 0


def _say(fact: Fact) -> None:
    said = f"{fact.step} {fact.name}"
    print(f"[{fact.seconds:5.0f} s] {said:<44} {fact.verdict:<7} {fact.detail}", flush=True)


def _keep(runner: Runner, options: argparse.Namespace) -> None:
    """Four files, for a machine may give back few."""
    tables = options.work / "tables"
    texts = [file.read_text().strip() for file in sorted(tables.glob("*.md"))]
    text = page(
        runner.facts,
        command=f"python -m tools.gpu {shlex.join(sys.argv[1:])}".strip(),
        date=time.strftime("%Y-%m-%d"),
        seconds=runner.seconds,
        tables="\n\n".join(texts),
    )
    (options.out / "report.md").write_text(text)
    facts = [asdict(fact) for fact in runner.facts]
    (options.out / "facts.json").write_text(json.dumps(facts, indent=1))
    numbers = {file.stem: json.loads(file.read_text()) for file in sorted(tables.glob("*.json"))}
    (options.out / "tables.json").write_text(json.dumps(numbers))
    with (options.out / "all.log").open("w") as whole:
        for log in (*sorted((options.work / "logs").iterdir()), *sorted(tables.glob("*.txt"))):
            said = log.read_text(errors="replace")
            whole.write(f"\n##### {log.name}\n{said if len(said) < _LOG else _ends(said)}\n")


def _ends(said: str) -> str:
    half = _LOG // 2
    return f"{said[:half]}\n##### ...\n{said[-half:]}"


if __name__ == "__main__":
    raise SystemExit(main())
