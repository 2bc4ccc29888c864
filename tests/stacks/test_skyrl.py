"""SkyRL 0.3.0: its worker wrapper, over shared memory.

Not run: its broadcast (`update_weights_nccl` calls `receive_weights(..., load_weights=...)`,
which vLLM 0.23 had and 0.32 has no more), its Ray cluster and its servers.
"""

from __future__ import annotations

import pytest

from tests.stacks import overlays
from tests.stacks.running import fresh, run
from tools.models.policies import Policies

pytestmark = overlays.needed("skyrl")


@overlays.on_each_vllm("skyrl")
@pytest.mark.parametrize("scheme", ["int8", "fp8_vllm"])
def test_what_its_worker_wrapper_loads_equals_a_fresh_start(
    policies: Policies, scheme: str, vllm: str
) -> None:
    """Start, chunks, finish are one update: with a chunk missing, the old weights stay."""
    answer = run("skyrl", "skyrl", policies.bf16("a"), policies.bf16("b"), scheme=scheme, vllm=vllm)

    a, b = fresh("skyrl", policies, scheme=scheme, vllm=vllm)
    assert answer["started"] == a
    assert answer["pushed b"] == b
    assert "the update ended with 1 layer half arrived" in answer["a chunk missing"][1]
    assert answer["after the missing chunk"] == b
    # SkyRL's own flag: its wrapper takes the refused update for one that still goes on.
    assert "already active" in answer["next start"][1]
    assert answer["pushed a"] == answer["after refusal"] == a
    assert "NaN" in answer["refused"][1]
