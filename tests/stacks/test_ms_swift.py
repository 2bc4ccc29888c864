"""ms-swift 4.6.0: its worker extension, over vLLM's store and over shared memory.

Not run: its rollout server, its trainers, Megatron and Ray.
"""

from __future__ import annotations

import pytest

from tests.stacks import overlays
from tests.stacks.running import fresh, run
from tools.models.policies import Policies

pytestmark = overlays.needed("ms-swift")

# Its own plugin imports vision models, which want torchvision.
OURS_ALONE = {"VLLM_PLUGINS": "flashquant"}


@overlays.on_each_vllm("ms-swift")
@pytest.mark.parametrize("scheme", ["int8", "fp8_vllm"])
def test_what_its_worker_extension_loads_equals_a_fresh_start(
    policies: Policies, scheme: str, vllm: str
) -> None:
    """By name, in flat buckets and through shared memory. Half a layer is said to status only."""
    paths = (policies.bf16("a"), policies.bf16("b"))
    answer = run("ms-swift", "ms_swift", *paths, scheme=scheme, vllm=vllm, **OURS_ALONE)

    a, b = fresh("ms-swift", policies, scheme=scheme, vllm=vllm, **OURS_ALONE)
    assert answer["started"] == answer["in buckets"] == a
    assert answer["by name"] == answer["through shared memory"] == b
    assert "NaN" in answer["refused"][1]
    assert answer["after refusal"] == b
    # Its end of an update catches every exception.
    assert answer["without v_proj"][0] == "nothing"
    assert "what had arrived of 1 layer was dropped" in answer["refusal"]
    assert "model.layers.1.self_attn.qkv_proj" in answer["refusal"]
    assert answer["completed"] == a
