"""A compiled model after a reload."""

from __future__ import annotations

import pytest

from tests.engine.checkpoints import Policies
from tests.engine.processes import run_program

pytestmark = pytest.mark.engine


@pytest.fixture(scope="module")
def policies(tmp_path_factory: pytest.TempPathFactory) -> Policies:
    return Policies(tmp_path_factory.mktemp("policies"), "qwen2")


@pytest.mark.parametrize("scheme", ["int8", "fp8_channel"])
def test_a_compiled_engine_sees_the_new_weights(policies: Policies, scheme: str) -> None:
    """Compiled code has addresses by heart; a reload in place is one that it sees."""
    answer = run_program("compiled", policies, FLASHRL_CONFIG=scheme, TORCHDYNAMO_DISABLE="0")

    assert answer["digests"]
    assert answer["reloaded"] == answer["fresh"]
    assert answer["reloaded"] != answer["before"]
