"""What a GPU has by default: a compiled model, and vLLM's second runner, which schedules ahead."""

from __future__ import annotations

import pytest

from tests.engine.kernels import MULTIPLIES_FP8
from tests.engine.processes import run_program
from tests.engine.serving import FP8_CHANNEL, needs, serve
from tools.models.policies import Policies

pytestmark = pytest.mark.engine


@pytest.fixture(scope="module")
def policies(tmp_path_factory: pytest.TempPathFactory) -> Policies:
    return Policies(tmp_path_factory.mktemp("policies"), "qwen2")


@pytest.mark.parametrize(
    "scheme", ["int8", pytest.param("fp8_channel", marks=[FP8_CHANNEL, MULTIPLIES_FP8])]
)
def test_a_compiled_engine_sees_the_new_weights(policies: Policies, scheme: str) -> None:
    """Compiled code has addresses by heart; a reload in place is one that it sees."""
    answer = run_program("compiled", policies, FLASHRL_CONFIG=scheme, TORCHDYNAMO_DISABLE="0")

    assert answer["digests"]
    assert answer["reloaded"] == answer["fresh"]
    assert answer["reloaded"] != answer["before"]


@needs(">=0.28", "second runner that a CPU can run")
@pytest.mark.parametrize("scheme", ["int8", pytest.param("fp8_channel", marks=FP8_CHANNEL)])
def test_the_runner_that_a_gpu_has_sees_the_new_weights(policies: Policies, scheme: str) -> None:
    """Its kernels interpreted, scheduling ahead; a dummy batch passes where no request may."""
    pytest.importorskip("triton")
    answer = run_program(
        "second_runner",
        policies,
        FLASHRL_CONFIG=scheme,
        FLASHQUANT_UNDO="cache",
        VLLM_USE_V2_MODEL_RUNNER="1",
        TRITON_INTERPRET="1",
    )

    a, b = (serve(policies.bf16(policy), scheme) for policy in "ab")
    assert answer["runner"] == "vllm.v1.worker.gpu.model_runner"
    assert answer["scheduler"] == "AsyncScheduler"
    assert answer["before"][0] == a.start.digest
    assert answer["before"] != answer["after"] == answer["undone"] == answer["fresh"]
    assert answer["fresh"][0] == b.start.digest
    assert answer["on its way"]
    assert 0 < answer["out"] < 7
    assert answer["went on"] == answer["expected"]
    assert answer["in the cache"] == 1.0  # the undo log, while that step was on its way
    assert answer["refused"][0] == "TornWeights"
