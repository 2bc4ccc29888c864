"""The table that sets vLLM's own reload beside flashquant in T1 to T14.

`test_experiments` holds flashquant to its side, weight by weight. Here: that a row says what
happened, whoever comes out badly, and that the two arms run.
"""

from __future__ import annotations

import json
import signal
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any
from unittest import mock

import pytest

from benchmarks import arms
from benchmarks.arms import FLASHQUANT, NATIVE
from benchmarks.experiments import EXPERIMENTS, Row, ended, holds, row, table

VERDICTS: dict[str, tuple[dict[str, Any], str | None]] = {
    "equals a fresh start": ({"raised": [], "equals_fresh": True, "gap": 0.0}, None),
    "refused: E, old weights still served": (
        {"raised": ["E"], "equals_old": True, "gap": 2.0},
        None,
    ),
    "silently wrong (max |Δ log-prob| NaN)": ({"raised": [], "gap": float("nan")}, None),
    "silently kept the old weights": ({"raised": [], "equals_old": True, "gap": 2.0}, None),
    "raised E, F; a mixture served": ({"raised": ["E", "F"], "gap": 2.0}, None),
    "raised E; the new weights served": (
        {"raised": ["E"], "equals_fresh": True, "gap": 0.0},
        None,
    ),
    "returned; generating raises G": ({"raised": [], "generating": "G"}, None),
    "raised E; generating raises G": ({"raised": ["E"], "generating": "G"}, None),
    "raised E; generating hangs": ({"raised": ["E"]}, "hangs"),
    "the push dies of SIGSEGV": ({}, "dies of SIGSEGV"),
}
RIGHT = "equals a fresh start"
HOLD = {RIGHT, "refused: E, old weights still served"}


def noted(facts: dict[str, Any]) -> str:
    """As an experiment writes it: one object a line, each before the next thing can go wrong."""
    return "".join(json.dumps({name: fact}) + "\n" for name, fact in facts.items())


def row_of(verdict: str, experiment: str = "T2", engine: str = "int8", arm: str = NATIVE) -> Row:
    facts, end = VERDICTS[verdict]
    return row(experiment, engine, arm, noted(facts), end)


@pytest.mark.parametrize("verdict", VERDICTS)
def test_a_verdict_says_what_was_noted_before_the_end(verdict: str) -> None:
    """By whichever arm."""
    assert row_of(verdict).verdict == verdict
    assert row_of(verdict, arm=FLASHQUANT).verdict == verdict


def test_only_the_right_weights_or_a_refusal_hold() -> None:
    """And a refusal only where there was something to refuse."""
    assert {verdict for verdict in VERDICTS if holds(row_of(verdict))} == HOLD
    assert {verdict for verdict in VERDICTS if holds(row_of(verdict, "T3"))} == {RIGHT}


@pytest.mark.parametrize(
    ("code", "end"),
    [
        (0, None),
        (1, "ends the process with 1"),
        (-signal.SIGALRM, "hangs"),
        (-signal.SIGSEGV, "dies of SIGSEGV"),
    ],
)
def test_how_a_process_ended(code: int, end: str | None) -> None:
    """The alarm is the time limit that an experiment sets itself."""
    assert ended(SimpleNamespace(join=lambda seconds: None, exitcode=code)) == end


def test_a_process_that_does_not_come_back_is_killed() -> None:
    """Though its alarm should have ended it."""
    child = mock.Mock(exitcode=None)

    assert ended(child) == "hangs"
    child.kill.assert_called_once_with()


def test_engines_of_flashquant_share_a_cell_while_they_agree() -> None:
    """Otherwise each has its say."""
    agree = [row_of(RIGHT, "T3", engine, FLASHQUANT) for engine in ("int8", "fp8")]
    part = [
        row_of(RIGHT, "T2", "int8", FLASHQUANT),
        row_of("returned; generating raises G", "T2", "fp8", FLASHQUANT),
    ]

    shared, own = table(agree + part).splitlines()[2:]

    assert shared == "| T3 T2, then the whole update, correct | equals a fresh start |"
    assert own.endswith("| int8: equals a fresh start; fp8: returned; generating raises G |")


def test_a_cell_does_not_break_the_table() -> None:
    """The bars of |Δ log-prob| are not borders."""
    (line,) = table(
        [row_of("silently wrong (max |Δ log-prob| NaN)"), row_of(RIGHT, arm=FLASHQUANT)]
    ).splitlines()[2:]

    assert line.replace(r"\|", "").count("|") == 4


def test_fourteen_experiments() -> None:
    """T14 is T11 on an fp8 engine; T0 is the update without a fault."""
    names = {experiment.name for experiment in EXPERIMENTS} - {"T0", "T13b"}

    assert names | {"T14"} == {f"T{number}" for number in range(1, 15)}


@pytest.mark.engine
def test_both_arms_live_through_it(tmp_path: Path) -> None:
    """An update that lacks a tensor, and one that comes after a failure, in bf16."""
    rows = tmp_path / "rows.json"
    chosen = ["--only", "T3", "T5", "--engines", "bf16", "--json", str(rows)]

    subprocess.run(
        [sys.executable, "-m", "benchmarks.experiments", *chosen], cwd=arms.ROOT, check=True
    )

    found = {(r["experiment"], r["arm"]): r["verdict"] for r in json.loads(rows.read_text())}
    assert found["T3", FLASHQUANT] == RIGHT
    assert found["T5", FLASHQUANT] == "refused: IncompleteUpdate, old weights still served"
    assert found["T3", NATIVE].startswith("raised AssertionError; generating raises")
    assert found["T5", NATIVE].startswith("silently wrong")
