"""A mixture over two ranks, of which one fails alone: both hold all of the old, or all of the new.

One rank raises in any function of an update, at any of its calls, or is late there, by less or by
more than the other waits; then it is killed. `--hypothesis-profile long` throws 500 faults, and
kills eight engines.
"""

from __future__ import annotations

from typing import Any

import pytest
from hypothesis import settings

from tests.engine.faults import INJECTED, SEED
from tests.engine.kernels import WORKER_KERNELS, has_amx_kernels
from tests.engine.processes import CORES, assert_lost, run
from tests.engine.serving import needs
from tools.models.policies import Policies

pytestmark = [
    pytest.mark.engine,
    pytest.mark.timeout(1200),
    needs(">=0.30", "kernel of experts on a CPU that can be told which experts it has"),
]

# Faults of each engine; each is killed by one more.
ENGINES = [62] * 8 if settings.default.max_examples > 100 else [29]


@pytest.fixture(scope="module", params=range(len(ENGINES)))
def told(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Any:
    number, mixture = request.param, Policies(tmp_path_factory.mktemp("fire"), "qwen3-moe")
    faults, cut = ENGINES[number], ("experts", "tensors")[number % 2]
    answer = run(
        *("under_fire", mixture.bf16("a"), mixture.bf16("b"), cut, faults, SEED + number),
        FLASHRL_CONFIG="int8" if has_amx_kernels() else "bf16",
        **{WORKER_KERNELS: "amx" if has_amx_kernels() else "native"},
        VLLM_ENABLE_V1_MULTIPROCESSING="1",
        VLLM_ALLOW_INSECURE_SERIALIZATION="1",  # to send the workers a fault
        VLLM_CPU_OMP_THREADS_BIND=CORES,
    )
    INJECTED[f"qwen3-moe over two ranks, {cut}"] += faults + 1
    return answer


def test_both_ranks_hold_the_old_weights_or_the_new_ones_whole(told: dict[str, Any]) -> None:
    """And whatever was pushed next is right."""
    assert [t for t in told["told"] if t["held"] not in ("old", "new")] == []
    assert [t["fault"] for t in told["told"] if not t["afterwards"]] == []
    assert [t["fault"] for t in told["told"] if not t["reached"]] == []
    assert {t["held"] for t in told["told"]} == {"old", "new"}


def test_what_nobody_heard_of_is_what_was_pushed(told: dict[str, Any]) -> None:
    """A rank that raises is reported; one that is late is waited for, or reported."""
    silent = [t for t in told["told"] if t["raised"] == "nothing: "]

    assert silent
    assert [t for t in silent if t["does"] == "raises" or t["held"] != "new"] == []
    assert [t for t in told["told"] if t["does"] == "is late" and t not in silent] == []
    assert any("not ready after 1 s" in t["raised"] for t in told["told"])


def test_nothing_hangs(told: dict[str, Any]) -> None:
    assert max(t["seconds"] for t in told["told"]) < 30
    assert_lost(told["lost"], rank=told["died"])


def test_a_rank_that_does_not_keep_the_promise_is_seen(told: dict[str, Any]) -> None:
    """These tests can fail."""
    assert [how for how, seen in told["broken"].items() if not seen] == []
