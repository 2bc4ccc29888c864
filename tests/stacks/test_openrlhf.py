"""OpenRLHF 0.11.2: its worker extension, over gloo and over shared memory.

Not run: its actors and its Ray cluster; the loop over the parameters is written after
`ActorPPOTrainer.broadcast_to_vllm`.
"""

from __future__ import annotations

import pytest

from tests.engine.checkpoints import Policies
from tests.engine.serving import serve
from tests.stacks import overlays
from tests.stacks.programs.rollouts import said
from tests.stacks.running import run

pytestmark = overlays.needed("openrlhf")


@pytest.mark.parametrize("scheme", ["int8", "fp8_vllm"])
def test_what_its_worker_extension_loads_equals_a_fresh_start(
    policies: Policies, scheme: str
) -> None:
    """A tensor a call; a bad one changes nothing, and half a layer waits for the rest."""
    answer = run("openrlhf", "openrlhf", policies.bf16("a"), policies.bf16("b"), scheme=scheme)

    a, b = (said(serve(policies.bf16(policy), scheme).llm) for policy in "ab")
    assert answer["started"] == a
    assert answer["broadcast"] == b
    assert answer["ipc"] == a
    assert "NaN" in answer["refused"][1]
    assert answer["after refusal"] == a
    assert answer["without v_proj"] == ["model.layers.1.self_attn.qkv_proj"]
    assert answer["completed"] == b
