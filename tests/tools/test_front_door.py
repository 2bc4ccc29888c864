"""What a stranger reads first: short, and true of the code beside it."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

from flashquant import errors
from flashquant.config.schemes import NAMES
from tools import idea, readme

ROOT = Path(__file__).parents[2]
DOCS = ROOT / "docs"
PAGES = [*sorted(DOCS.rglob("*.md")), *sorted(ROOT.glob("*.md")), ROOT / "benchmarks/README.md"]


def names(page: str) -> set[str]:
    """What a page of the documentation writes as code."""
    return set(re.findall(r"`([\w.]+)[^`]*`", (DOCS / page).read_text()))


def test_the_readme_is_read_in_five_minutes():
    assert len(readme.README.read_text().splitlines()) <= 200


def test_the_numbers_of_the_readme_are_those_of_the_page_about_performance():
    found = readme.medians(readme.PERFORMANCE.read_text())

    assert f"{readme.BEGIN}\n\n{readme.table(found)}\n\n{readme.END}" in readme.README.read_text()


def test_the_medians_are_those_of_the_model_that_was_asked_for():
    row = "| {} | median |\n| :-- | --: |\n| flashquant | {} |\n"
    tables = [
        f"{name}: 2 tensors, of bf16, median of 3 rounds\n\n"
        + row.format("bf16", f"{time} ms")
        + row.format("int8 frozen", "9 ms")
        for name, time in (("small", 1), ("large", 2))
    ]

    assert readme.medians("\n".join(tables), "large") == {"bf16": {"flashquant": "2 ms"}}


def test_the_picture_is_the_one_that_the_script_draws():
    assert idea.PICTURE.read_text() == idea.picture()


@pytest.mark.parametrize("page", PAGES, ids=lambda page: str(page.relative_to(ROOT)))
def test_a_page_links_to_files_that_are_there(page: Path):
    links = re.findall(r"\]\(([^)\s#]+)[^)]*\)", page.read_text())
    local = [link for link in links if "://" not in link]

    assert [link for link in local if not (page.parent / link).exists()] == []


@pytest.mark.parametrize("page", PAGES, ids=lambda page: str(page.relative_to(ROOT)))
def test_a_page_names_files_that_are_there(page: Path):
    """Those of the package may be named as they lie in it: `update/session.py`."""
    named = re.findall(r"`((?:[\w-]+/)+[\w-]+\.(?:py|c|h|md|sh|yaml|txt|lock))`", page.read_text())

    ours = [name for name in named if not name.startswith("platforms/")]  # that is vLLM's
    where = (ROOT, ROOT / "flashquant")
    assert [name for name in ours if not any((root / name).exists() for root in where)] == []


def test_every_page_is_in_the_table_of_contents():
    contents = (ROOT / "mkdocs.yml").read_text()

    pages = [str(page.relative_to(DOCS)) for page in DOCS.rglob("*.md")]
    assert [page for page in pages if page not in contents] == []


def test_every_error_is_in_the_page_about_errors():
    raised = {name for name in vars(errors) if name[0].isupper()} - {"FlashquantError"}

    assert raised - {name.rpartition(".")[2] for name in names("errors.md")} == set()


def test_every_scheme_is_in_the_page_about_schemes():
    assert NAMES.keys() - names("schemes.md") == set()
