"""OpenRLHF 0.11.2: its worker extension, over gloo and over shared memory.

Not run: its actors and its Ray cluster; the loop over the parameters is written after
`ActorPPOTrainer.broadcast_to_vllm`.
"""

from __future__ import annotations

import pytest

from tests.stacks import overlays
from tests.stacks.running import fresh, run
from tools.models.policies import Policies

pytestmark = overlays.needed("openrlhf")


@overlays.on_each_vllm("openrlhf")
@pytest.mark.parametrize("scheme", ["int8", "fp8_vllm"])
def test_what_its_worker_extension_loads_equals_a_fresh_start(
    policies: Policies, scheme: str, vllm: str
) -> None:
    """A tensor a call; a bad one changes nothing, and half a layer waits for the rest."""
    answer = run(
        "openrlhf", "openrlhf", policies.bf16("a"), policies.bf16("b"), scheme=scheme, vllm=vllm
    )

    a, b = fresh("openrlhf", policies, scheme=scheme, vllm=vllm)
    assert answer["started"] == a
    assert answer["broadcast"] == b
    assert answer["ipc"] == a
    assert "NaN" in answer["refused"][1]
    assert answer["after refusal"] == a
    assert answer["without v_proj"] == ["model.layers.1.self_attn.qkv_proj"]
    assert answer["completed"] == b
