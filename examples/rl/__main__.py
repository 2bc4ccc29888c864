"""`python -m examples.rl`: the arms, one after another, and the picture at the end."""

from __future__ import annotations

import argparse
import copy
import os
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from rich import box
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn
from rich.table import Table

from examples.rl import judge, plot
from examples.rl.record import AlreadyRecorded, Record
from examples.rl.rollout import ENGINE_ENVIRONMENT, ENGINE_FORBIDDEN
from examples.rl.settings import ARMS, Arm, Settings, arm

QUICK_ARMS = ("bf16", "int8+tis", "coarse+tis", "coarse")
QUICK_STEPS = 30
HEADINGS = (
    "arm",
    "seeds",
    "accuracy",
    "of the seeds",
    "vs bf16, 95 %",
    "KL (k3)",
    "ESS",
    "sync, ms",
)


def main(argv: list[str] | None = None) -> int:
    """Run what was asked for; all arms of a seed before the next seed."""
    arguments = parse(argv)
    os.environ.update(ENGINE_ENVIRONMENT)  # before anything imports vLLM
    os.environ.pop(ENGINE_FORBIDDEN, None)
    # Tiny layers: a second thread costs more than it brings, and would change the last bits.
    torch.set_num_threads(1)
    console = Console()
    settings = replace(Settings(), steps=arguments.steps)
    arms = [arm(name) for name in arguments.arms]
    try:
        records = experiment(arms, arguments, settings, console)
    except AlreadyRecorded as refusal:
        console.print(f"[bold red]error[/]: {refusal}")
        return 1
    lines = [line for record in records for line in record.read()]
    picture = arguments.out / "learning.png"
    plot.draw(lines, picture)
    console.print(summary(lines))
    console.print(f"the picture: {picture}")
    return 0


def parse(argv: list[str] | None) -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(
        prog="python -m examples.rl",
        description="DAPO on addition: a small decoder, vLLM rollouts in several schemes.",
    )
    parser.add_argument("--arms", nargs="+", metavar="ARM", help=f"among {', '.join(ARMS)}")
    parser.add_argument("--seeds", type=int, help="how many")
    parser.add_argument("--first-seed", type=int, default=0, help="of them (default: 0)")
    parser.add_argument("--steps", type=int, help="of RL")
    parser.add_argument("--out", type=Path, default=Path("rl-results"), metavar="DIR")
    parser.add_argument("--resume", action="store_true", help="go on from the last checkpoints")
    parser.add_argument(
        "--quick",
        action="store_true",
        help=f"one seed, {QUICK_STEPS} steps, {len(QUICK_ARMS)} arms",
    )
    arguments = parser.parse_args(argv)
    quick = arguments.quick
    arguments.arms = arguments.arms or list(QUICK_ARMS if quick else ARMS)
    arguments.seeds = arguments.seeds or (1 if quick else 5)
    arguments.steps = arguments.steps or (QUICK_STEPS if quick else Settings().steps)
    unknown = [name for name in arguments.arms if name not in ARMS]
    if unknown:
        parser.error(f"there is no arm {unknown[0]!r}. Choose among {', '.join(ARMS)}.")
    return arguments


def experiment(
    arms: list[Arm], arguments: argparse.Namespace, settings: Settings, console: Console
) -> list[Record]:
    """Every run, drawn as it goes."""
    # Here, and not above: both are slow to import, and `--help` needs neither.
    from examples.rl.rollout import Engine
    from examples.rl.train import Run

    records, engines = [], {}
    with bars(console) as progress:
        starts = {
            calculator: start(calculator, arguments.out, settings, progress)
            for calculator in sorted({one.calculator for one in arms})
        }
        for seed in range(arguments.first_seed, arguments.first_seed + arguments.seeds):
            for one in arms:
                # Engines live until the end: vLLM takes the others down with one that dies.
                if one.scheme not in engines:
                    folder = arguments.out / start_name(one.calculator)
                    engines[one.scheme] = Engine(one.scheme, folder)
                record = Record(arguments.out / one.name / f"seed-{seed}")
                run = Run(
                    one,
                    seed,
                    settings,
                    model=copy.deepcopy(starts[one.calculator]),
                    engine=engines[one.scheme],
                    record=record,
                )
                bar = progress.add_task(f"{one.name}, seed {seed}", total=settings.steps, note="")
                run.go(resume=arguments.resume, progress=drawer(progress, bar))
                records.append(record)
    return records


def start_name(calculator: bool) -> str:
    return "start-calculator" if calculator else "start"


def start(calculator: bool, out: Path, settings: Settings, progress: Progress) -> Any:
    """The supervised start of one kind of episode."""
    from examples.rl.model import cached_warm_start

    name = start_name(calculator)
    bar = progress.add_task(f"supervised {name}", total=settings.warm_steps, note="")
    model = cached_warm_start(
        settings,
        out / name,
        calculator=calculator,
        progress=lambda step, right: progress.update(
            bar, completed=step, note=f"accuracy {right:.2f}"
        ),
    )
    progress.update(bar, completed=settings.warm_steps)
    return model


def drawer(progress: Progress, bar: Any) -> Any:
    """What draws one step of one run."""

    def draw(step: int, line: dict[str, Any]) -> None:
        progress.update(bar, completed=step, note=f"reward {line['reward']:.2f}")

    return draw


def bars(console: Console) -> Progress:
    return Progress(
        TextColumn("{task.description:<26}"),
        BarColumn(),
        MofNCompleteColumn(),
        TimeElapsedColumn(),
        TextColumn("{task.fields[note]}"),
        console=console,
    )


def summary(lines: list[dict[str, Any]]) -> Table:
    """Each arm at its last looks."""
    # The box that documentation takes as it stands.
    title = "the last three looks, mean over seeds"
    table = Table(title=title, box=box.MARKDOWN, title_justify="left")
    rows: list[tuple[str, ...]] = []
    for name in dict.fromkeys(line["arm"] for line in lines):
        own = [line for line in lines if line["arm"] == name]
        interval = judge.difference(lines, name, "bf16") if name != "bf16" else None
        rows.append((name, *cells(own, interval)))
    # Of one seed there is no spread: what nothing is said in would only wrap the others.
    said = [column for column in zip(HEADINGS, *rows, strict=True) if any(column[1:])]
    for heading, *_ in said:
        is_name = heading == "arm"
        table.add_column(heading, justify="left" if is_name else "right", no_wrap=is_name)
    for row in zip(*(column[1:] for column in said), strict=True):
        table.add_row(*row)
    return table


def cells(lines: list[dict[str, Any]], interval: judge.Interval | None) -> list[str]:
    """What the table says of one arm: its end, and its means over all steps."""
    ends = list(judge.ends(lines, lines[0]["arm"]).values())

    def mean(metric: str) -> float:
        values = [line[metric] for line in lines if line.get(metric) is not None]
        return sum(values) / len(values) if values else float("nan")

    return [
        f"{len(ends)}",
        f"{sum(ends) / len(ends):.3f}",
        f"{min(ends):.3f} to {max(ends):.3f}" if len(ends) > 1 else "",
        "" if interval is None else str(interval),
        f"{mean('k3'):.1e}",
        f"{mean('ess'):.3f}",
        f"{1e3 * mean('sync_seconds'):.0f}",
    ]


if __name__ == "__main__":
    raise SystemExit(main())
