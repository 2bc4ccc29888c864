"""Tensor parallel over two processes: both ranks commit, or neither does."""

from __future__ import annotations

import pytest

from tests.engine.kernels import want_int4
from tests.engine.processes import CORES, TORCHRUN, assert_lost, run_program
from tests.engine.serving import FP8_CHANNEL, needs
from tools.models.policies import Policies

pytestmark = pytest.mark.engine
WHOLE_ROWS = needs(">=0.28", "scales of whole rows over ranks")


@pytest.fixture(scope="module")
def policies(tmp_path_factory: pytest.TempPathFactory) -> Policies:
    return Policies(tmp_path_factory.mktemp("policies"), "qwen2")


@pytest.mark.parametrize(
    "scheme",
    [
        "int8",
        "fp8_vllm",
        pytest.param("fp8_channel", marks=needs(">=0.28", "scales of whole rows over ranks")),
        pytest.param("fp8_tensor", marks=FP8_CHANNEL),
        "int4",
        "int4_channel",
    ],
)
def test_two_workers_commit_together_or_not_at_all(policies: Policies, scheme: str) -> None:
    """Tensor parallel: rank 1 fails alone, and is then killed in the middle of an update."""
    want_int4(scheme)
    answer = run_program(
        "tensor_parallel",
        policies,
        FLASHRL_CONFIG=scheme,
        VLLM_ENABLE_V1_MULTIPROCESSING="1",
        VLLM_ALLOW_INSECURE_SERIALIZATION="1",  # to send the workers a fault
        VLLM_CPU_OMP_THREADS_BIND=CORES,
    )

    steps = answer["steps"]
    assert answer["reported"] == steps["pushed b"] != steps["started on a"]
    assert len(set(steps["pushed b"])) == 2  # each rank holds a shard of its own
    assert answer["failed"][:2] == ["ReloadError", "rank 1: MemoryError: injected"]
    assert steps["rank 1 failed"] == steps["pushed b"]
    assert steps["pushed a"] == steps["started on a"]  # equal to a fresh start, per rank
    assert "rank 1 did not commit this update (MemoryError" in answer["refused"][1]
    assert steps["rank 1 failed in vLLM's reload"] == steps["started on a"]
    assert steps["pushed b by vLLM's reload"] == steps["pushed b"]
    assert_lost(answer["lost"], rank=1)


@pytest.mark.parametrize("scheme", ["int8", "fp8_vllm"])
def test_ranks_of_their_own_commit_together_or_not_at_all(policies: Policies, scheme: str) -> None:
    """external_launcher: no front end in common, each program pushes to its own worker."""
    answer = run_program(
        "external_launcher",
        policies,
        TORCHRUN,
        FLASHRL_CONFIG=scheme,
        VLLM_CPU_OMP_THREADS_BIND=CORES,
        GLOO_SOCKET_IFNAME="lo",
    )

    assert len(set(answer["pushed b"])) == 2  # each rank holds a shard of its own
    assert answer["pushed b"] != answer["started on a"]
    (followed, why), (failed, _) = answer["raised"]
    assert (followed, failed) == ("PeerFailed", "MemoryError")
    assert "rank 1 did not commit this update (MemoryError: injected)" in why
    assert answer["rank 1 failed"] == answer["pushed b"]
    assert answer["pushed a"] == answer["started on a"]  # equal to a fresh start, per rank
