"""Run the parts, each in a process of its own, and put their tables on a page."""

from __future__ import annotations

import argparse
import contextlib
import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

from benchmarks.gpu import parts, scratch
from benchmarks.gpu.facts import Facts
from benchmarks.gpu.parts import Part
from benchmarks.results import save_text

_LEAST = 20.0  # seconds; with less left, a part is not begun


def main(argv: list[str] | None = None) -> int:
    """0 when everything was measured."""
    options = _options(argv)
    if options.list:
        for part in parts.PARTS:
            sys.stdout.write(f"{part.name:<30} at most {part.seconds} s\n")
        return 0
    if options.part:
        return _here(options)
    until = time.monotonic() + options.budget
    found = parts.chosen(options.only, small=options.small)
    try:
        ended = [_elsewhere(part, options, until - time.monotonic()) for part in found]
    finally:
        if not options.keep:
            shutil.rmtree(options.scratch, ignore_errors=True)
    page = _page(found, options.out)
    sys.stdout.write(f"\n{page}\n")
    save_text(page, options.out / "gpu.md")
    return 0 if all(ended) else 1


def _options(argv: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.gpu", description=__doc__)
    parser.add_argument("--only", nargs="+", default=[], metavar="NAME", help="parts that begin so")
    parser.add_argument("--list", action="store_true", help="the parts, and their limits")
    parser.add_argument("--device", choices=("cuda", "cpu"), default="cuda")
    parser.add_argument("--small", action="store_true", help="tiny models and shapes: a rehearsal")
    parser.add_argument("--rounds", type=int, default=5, help="turns that count (5)")
    parser.add_argument("--budget", type=float, default=1800, metavar="SECONDS", help="(1800)")
    parser.add_argument("--scratch", type=Path, default=scratch.folder(), metavar="FOLDER")
    parser.add_argument("--keep", action="store_true", help="the checkpoints in it")
    parser.add_argument("--lines", action="store_true", help="a line of JSON a fact")
    parser.add_argument("--out", type=Path, default=Path("benchmarks/out"))
    parser.add_argument("--part", help=argparse.SUPPRESS)  # one part, in this process
    return parser.parse_args(argv)


def _here(options: argparse.Namespace) -> int:
    (part,) = [p for p in parts.chosen([], small=options.small) if p.name == options.part]
    facts = Facts(part.name, as_json=options.lines)
    if options.device == "cuda" and (missing := _why_no_gpu()):
        facts.tell("device", missing, "fails")
        return 1
    facts.guarded(
        part.name,
        lambda: parts.run(
            part,
            device=options.device,
            small=options.small,
            rounds=options.rounds,
            scratch=options.scratch,
            facts=facts,
            out=options.out,
        ),
    )
    sys.stdout.flush()
    os._exit(1 if facts.has_failures else 0)  # engines take their time to be torn down


def _why_no_gpu() -> str:
    import torch

    if torch.cuda.is_available():
        return ""
    return "torch sees no GPU here; --device cpu --small rehearses every line without one"


def _elsewhere(part: Part, options: argparse.Namespace, left: float) -> bool:
    """One part as a program, ended with all that it started when its time is over."""
    if left < _LEAST:
        sys.stdout.write(f"{part.name}: not begun, for want of time\n")
        return False
    limit = min(part.seconds * (3 if options.device == "cpu" else 1), left)
    command = [sys.executable, "-m", "benchmarks.gpu", "--part", part.name]
    command += ["--device", options.device, "--rounds", str(options.rounds)]
    command += ["--scratch", str(options.scratch), "--out", str(options.out)]
    command += [f"--{name}" for name in ("small", "lines") if getattr(options, name)]
    process = subprocess.Popen(command, start_new_session=True)
    try:
        return process.wait(limit) == 0
    except subprocess.TimeoutExpired:
        sys.stdout.write(f"{part.name}: ended after {limit:.0f} s\n")
        return False
    finally:
        _end(process)


def _end(process: subprocess.Popen[bytes]) -> None:
    with contextlib.suppress(ProcessLookupError):
        os.killpg(process.pid, signal.SIGKILL)
    process.wait()


def _page(found: list[Part], out: Path) -> str:
    """The tables of all parts that have one."""
    files = [(part.name, out / f"gpu-{part.name}.md") for part in found]
    return "\n\n".join(
        f"## {name}\n\n{file.read_text().strip()}"
        if file.exists()
        else f"## {name}\n\nnot measured"
        for name, file in files
    )


if __name__ == "__main__":
    raise SystemExit(main())
