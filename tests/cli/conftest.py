"""Commands set environment variables for the engines that they start."""

from __future__ import annotations

import os
from collections.abc import Iterator

import pytest


@pytest.fixture(autouse=True)
def as_it_was() -> Iterator[None]:
    """The environment, for the tests that come after in the same process."""
    before = dict(os.environ)
    yield
    os.environ.clear()
    os.environ.update(before)
