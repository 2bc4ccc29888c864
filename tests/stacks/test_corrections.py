"""A stack's own loss and ours, given the same settings, weigh the same tokens alike."""

from __future__ import annotations

import pytest

from tests.stacks import overlays
from tests.stacks.running import run


@pytest.mark.parametrize(
    "stack",
    [
        pytest.param(stack, marks=overlays.needed(stack), id=stack)
        for stack in ("verl", "skyrl", "openrlhf", "ms-swift")
    ],
)
def test_a_stack_and_ours_weigh_alike(stack: str) -> None:
    answer = run(stack, "corrections", stack, scheme="")

    assert answer["compared"] >= 40
    assert answer["worst"] < 1e-4
