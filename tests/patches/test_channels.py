"""What flashquant hands itself across vLLM's code: where it can be seen, and for how long."""

from __future__ import annotations

import re
from pathlib import Path
from types import SimpleNamespace

import pytest

from flashquant.patches import channels
from flashquant.patches.channels import Ambient, Attribute

ROOM = Path(channels.__file__).parent


def test_a_value_is_there_while_its_block_runs_and_the_outer_one_after_it() -> None:
    ambient = Ambient[str]("test")

    with ambient.given("outer"):
        with ambient.given("inner"):
            assert ambient.get() == "inner"
        assert ambient.get() == "outer"

    assert ambient.get() is None


def test_an_attribute_is_kept_until_it_is_taken() -> None:
    attribute, owner = Attribute[int]("test"), SimpleNamespace()
    assert attribute.get(owner) is None

    assert attribute.put(owner, 1) == 1
    assert attribute.of(owner) == attribute.get(owner) == attribute.take(owner) == 1

    assert attribute.take(owner) is None
    with pytest.raises(KeyError):
        attribute.of(owner)


def test_there_are_no_channels_but_these() -> None:
    """A context variable, or an item of `vars` of one of vLLM's objects, that is not listed."""
    made = re.compile(r"\bContextVar\b|vars\(\w+\)\[\w+\]|vars\(\w+\)\.setdefault")
    others = {path.name for path in ROOM.rglob("*.py") if made.search(path.read_text())} - {
        "channels.py"
    }

    assert others == set()


def test_every_ambient_value_is_listed() -> None:
    defined = {
        name
        for path in ROOM.rglob("*.py")
        for name in re.findall(r'Ambient\[.*\]\("(\w+)"\)', path.read_text())
    }

    assert defined == set(re.findall(r"^    (flashquant_\w+)", channels.__doc__ or "", re.M))
