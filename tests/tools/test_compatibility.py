"""The processes that cells of docs/compatibility.md run in: one that is lost costs one cell."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from tools.compatibility.cell import DIED, EXACT, Cell
from tools.compatibility.workers import Worker

# Instead of two engines: the scheme says what happens to the process.
_PROGRAM = """
import os, sys, time
from multiprocessing.connection import Connection
from pathlib import Path
from tools.compatibility.cell import EXACT, Cell
from tools.compatibility.workers import answer

def look(architecture, scheme, folder):
    if scheme == "late":
        time.sleep(60)
    if scheme == "killed":
        print("CHECK failed", flush=True)
        os.abort()
    if scheme == "broken":
        sys.exit("no such module")
    return Cell(architecture, scheme, EXACT, str(os.getpid()))

answer(look, Path(sys.argv[2]), Connection(int(sys.argv[3])))
"""


class Fake(Worker):
    PROGRAM = (sys.executable, "-c", _PROGRAM)


@pytest.fixture
def worker(tmp_path: Path) -> Iterator[Fake]:
    worker = Fake("judge", tmp_path, seconds=30)
    yield worker
    worker.close()


def test_cells_share_a_process(worker: Fake) -> None:
    first, second = (worker.look((name, "int8")) for name in ("llama", "qwen2"))

    assert (first.verdict, first.why) == (EXACT, second.why)


def test_a_process_that_is_killed_costs_its_cell(worker: Fake) -> None:
    lost = worker.look(("llama", "killed"))

    assert lost == Cell("llama", "killed", DIED, "SIGABRT: CHECK failed")
    assert worker.look(("llama", "int8")).verdict == EXACT


def test_a_cell_that_is_late_costs_nobody_else(worker: Fake) -> None:
    before = worker.look(("llama", "int8"))
    worker.seconds = 1
    late = worker.look(("llama", "late"))
    worker.seconds = 30
    after = worker.look(("llama", "int8"))

    assert late == Cell("llama", "late", DIED, "no answer in 1 seconds")
    assert after.verdict == EXACT
    assert after.why != before.why  # the late process is gone, and its answer with it


def test_a_process_that_cannot_work_is_no_cell(worker: Fake) -> None:
    with pytest.raises(RuntimeError, match="at llama-broken: no such module"):
        worker.look(("llama", "broken"))
