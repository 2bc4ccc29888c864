"""A process that has made an engine before FLASHRL_CONFIG was set."""

from __future__ import annotations

import pytest

from tests.engine import processes
from tests.engine.serving import serve
from tools.models.policies import Policies

pytestmark = pytest.mark.engine


@pytest.fixture(scope="module")
def policies(tmp_path_factory: pytest.TempPathFactory) -> Policies:
    return Policies(tmp_path_factory.mktemp("policies"), "qwen2")


@pytest.mark.parametrize("multiprocessing", ["0", "1"], ids=["in process", "elsewhere"])
def test_an_engine_from_before_says_what_to_do_and_a_later_one_is_patched(
    policies: Policies, multiprocessing: str
) -> None:
    """Neither `NotImplementedError`, nor bf16 in silence."""
    told = processes.run(
        "set_late",
        policies.bf16("a"),
        policies.bf16("b"),
        VLLM_ENABLE_V1_MULTIPROCESSING=multiprocessing,
    )

    assert told["patched"] == [False, True]
    for asked in ("unset", "set", "status"):
        kind, says, _ = told[asked]
        assert kind == "ReloadError", told[asked]
        assert "not looked after by flashquant" in says
        assert "Set" in says
        assert "FLASHRL_CONFIG" in says
    assert told["scheme"] == "int8"
    assert told["digest"] == serve(policies.bf16("b"), "int8").start.digest
