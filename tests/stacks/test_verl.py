"""verl 0.9.1: its worker extension and its bucketed transfer, by shared memory."""

from __future__ import annotations

import pytest

from tests.stacks import overlays
from tests.stacks.running import fresh, run
from tools.models.policies import Policies

pytestmark = overlays.needed("verl")


@overlays.on_each_vllm("verl")
@pytest.mark.parametrize("scheme", ["int8", "fp8_vllm"])
def test_what_its_buckets_bring_equals_a_fresh_start(
    policies: Policies, scheme: str, vllm: str
) -> None:
    """Half a layer when verl says that it is done is an error; a whole update mends it."""
    answer = run("verl", "verl", policies.bf16("a"), policies.bf16("b"), scheme=scheme, vllm=vllm)

    a, b = fresh("verl", policies, scheme=scheme, vllm=vllm)
    assert answer["started"]["digest"] not in (a["digest"], b["digest"])
    assert answer["pushed a first"] == a
    assert answer["pushed b"] == b
    assert "arrived only in part" in answer["half a layer"][1]
    assert answer["pending"] == ["model.layers.1.self_attn.qkv_proj"]
    assert answer["pushed b again"] == b
    # Its receiver answers nothing when it refuses a bucket, and its sender waits (zmq.Again).
    assert answer["refused"][0] == "Again"
    assert answer["pushed a"] == a
