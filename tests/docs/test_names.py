"""What the pages name is there: public names with their arguments, and environment variables."""

from __future__ import annotations

import ast
import inspect
import re
from typing import Any

import pytest

import flashquant
from flashquant import errors, sender, tis
from flashquant.config import env
from flashquant.update import ReloadReport, Status
from tests.docs import pages
from tests.docs.pages import ROOT, Block

# What a page calls these things, and what they are.
KNOWN: dict[str, Any] = {
    "errors": errors,
    "flashquant": flashquant,
    "report": ReloadReport,
    "sender": sender.Sender,
    "status": Status,
    "store": sender.BundleStore,
    "tis": tis,
}


def dotted(span: Block) -> list[str]:
    """The public names in a span, as `report.changed` or `tis.from_verl`."""
    text = re.sub(r"(?:flashquant\.)?status\(\w*\)\.", "status.", span.text)
    return re.findall(rf"(?<![\w/.])(?:{'|'.join(KNOWN)})(?:\.[a-zA-Z_]\w*)+(?![\w/])", text)


def is_there(name: str) -> bool:
    first, *rest = name.split(".")
    found = KNOWN[first]
    for part in rest:
        known_fields = getattr(found, "__dataclass_fields__", {})
        if part in known_fields or part in getattr(found, "model_fields", {}):
            return True
        if not hasattr(found, part):
            return first == "flashquant" and _is_module(name)
        found = getattr(found, part)
    return True


def _is_module(name: str) -> bool:
    path = ROOT.joinpath(*name.split("."))
    return path.is_dir() or path.with_suffix(".py").is_file()


def test_every_public_name_of_a_sentence_is_there() -> None:
    wrong = {
        f"{span}: {name}"
        for span in pages.spans()
        for name in dotted(span)
        if not name.endswith((".py", ".md")) and not is_there(name)  # files have a test
    }

    assert wrong == set()


def test_every_argument_of_a_call_in_a_sentence_is_taken() -> None:
    wrong = [f"{span}: {span.text}" for span in pages.spans() if not takes(span.text)]

    assert wrong == []


def takes(text: str) -> bool:
    try:
        tree = ast.parse(text, mode="eval")
    except SyntaxError:
        return True  # no Python, or a piece of it
    for node in ast.walk(tree):
        if not isinstance(node, ast.Call) or not (name := ast.unparse(node.func)).startswith(
            ("tis.", "flashquant.")
        ):
            continue
        found: Any = flashquant if name.startswith("flashquant.") else tis
        for part in name.split(".")[1:]:
            found = getattr(found, part)
        known = inspect.signature(found).parameters
        if not {keyword.arg for keyword in node.keywords} <= known.keys():
            return False
    return True


def test_every_environment_variable_of_a_page_is_read() -> None:
    """By flashquant, or by the tests."""
    known = {variable.name for variable in env.VARIABLES}
    named = {
        (page.name, name)
        for page in pages.PAGES
        for name in re.findall(r"\bFLASH(?:QUANT|RL)_[A-Z_]+[A-Z]\b", page.read_text())
    }
    of_tests = (ROOT / "Makefile").read_text() + (ROOT / "tests/support/isa.py").read_text()

    assert [one for one in sorted(named) if one[1] not in known and one[1] not in of_tests] == []


@pytest.mark.parametrize("wrong", ["report.chnged", "tis.from_trll", "flashquant.realod"])
def test_a_wrong_name_would_be_found(wrong: str) -> None:
    assert dotted(Block("here", 1, "span", wrong)) == [wrong]
    assert not is_there(wrong)


def test_a_wrong_argument_would_be_found() -> None:
    assert not takes('tis.from_verl(rollout_iss="token")')
