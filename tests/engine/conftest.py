"""What the engines of one file have taken is given back before the next file begins."""

from __future__ import annotations

import sys
from collections.abc import Iterator

import pytest


@pytest.fixture(scope="module", autouse=True)
def memory_of_engines() -> Iterator[None]:
    """Two processes of tests, with engines that stay, would need more than 24 GB."""
    yield
    if (serving := sys.modules.get("tests.engine.serving")) is not None:
        serving.put_away()
