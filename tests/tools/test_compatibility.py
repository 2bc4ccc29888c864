"""The processes that cells of docs/compatibility.md run in: one that is lost costs one cell."""

from __future__ import annotations

import json
import sys
from collections.abc import Iterator
from dataclasses import asdict
from pathlib import Path

import pytest

from tools.compatibility import ranks
from tools.compatibility.cell import DIED, ENGINE, EXACT, REFUSED, WRONG, Cell
from tools.compatibility.table import Part
from tools.compatibility.workers import Worker
from tools.versions.table import put_into

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


PART = Part("part", ("llama", "qwen2"), ("bf16", "int8"))
PAGE = f"""before
{PART.begin}
{PART.end}
after"""


def test_a_part_is_merged_into_the_page_and_the_rest_stays(tmp_path: Path) -> None:
    """In the order of the rows, whichever came first; reasons are told apart again."""
    page = tmp_path / "page.md"
    page.write_text(PAGE)
    long = f"ValueError: {'a kernel of many words ' * 8}. In the end, none."
    for found in (
        [Cell("qwen2", "int8", ENGINE, long), Cell("qwen2", "bf16", EXACT)],
        [Cell("llama", "int8", REFUSED, "model.x: no kernel"), Cell("qwen2", "bf16", WRONG, "b")],
        [Cell("llama", "bf16", EXACT), Cell("qwen2", "bf16", EXACT)],
    ):
        put_into(page, PART.merged(page.read_text(), found), PART.begin, PART.end)

    assert PART.read(page.read_text()) == {
        "llama": {"bf16": "exact", "int8": "refused (1)"},
        "qwen2": {"bf16": "exact", "int8": "engine (2)"},
    }
    assert f"1. model.x: no kernel\n2. {long[:40]}" in page.read_text()
    assert long in " ".join(page.read_text().split())
    assert page.read_text().startswith("before\n")
    assert page.read_text().endswith("\nafter")


def test_what_was_not_run_is_said(tmp_path: Path) -> None:
    text = PART.merged(PAGE, [Cell("llama", "bf16", EXACT), Cell("qwen2", "int8", EXACT)])

    assert PART.read(f"{PART.begin}\n{text}\n{PART.end}")["llama"]["int8"] == "not run"


def test_a_cell_over_ranks_is_what_it_is_on_the_rank_where_least_is_right() -> None:
    exact, wrong, died = (Cell("llama", "int8 TP=2", v) for v in (EXACT, WRONG, DIED))

    assert ranks._worst([exact, exact]) == exact
    assert ranks._worst([exact, died]) == died
    assert ranks._worst([died, wrong]) == wrong


def test_a_rank_that_fails_alone_says_why_and_costs_its_cell(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Of a pipeline, the stage that has no experts goes on, and waits for the other."""
    refused = Cell("deepseek-v3", "int8 PP=2", REFUSED, "model.layers.1: no kernel")
    other = Cell("llama", "int8 PP=2", EXACT)

    def pair(verb: str, asked: list[tuple[str, str]], folder: Path, answers: Path) -> str:
        if ("llama", "int8 PP=2") in asked[:1]:
            answers.write_text(json.dumps(asdict(other)) + "\n")
        else:
            ranks._alone(verb, folder, asked[0]).write_text(json.dumps(asdict(refused)))
        return "two ranks ended with exit code 1"

    monkeypatch.setattr(ranks, "_run_pair", pair)
    asked = [(cell.architecture, cell.scheme) for cell in (refused, other)]

    assert list(ranks.run("judge", asked, tmp_path)) == [refused, other]
