"""checkpoint-engine 0.4.2: its worker extension and its conversation over ZMQ.

Not run: its parameter server, which needs a GPU to be made.
"""

from __future__ import annotations

import pytest

from tests.stacks import overlays
from tests.stacks.running import fresh, run
from tools.models.policies import Policies

pytestmark = overlays.needed("checkpoint-engine")


@overlays.on_each_vllm("checkpoint-engine")
@pytest.mark.parametrize("scheme", ["int8", "fp8_vllm"])
def test_what_its_worker_extension_loads_equals_a_fresh_start(
    policies: Policies, scheme: str, vllm: str
) -> None:
    """A refused bucket is told to the server; half a layer at the end is an error."""
    answer = run(
        "checkpoint-engine",
        "checkpoint_engine",
        policies.bf16("a"),
        policies.bf16("b"),
        scheme=scheme,
        vllm=vllm,
    )

    a, b = fresh("checkpoint-engine", policies, scheme=scheme, vllm=vllm)
    assert answer["started"] == a
    assert answer["pushed b"] == b
    assert "MisfitTensor" in answer["refused"][1]
    assert answer["after refusal"] == b
    # Its worker answers nothing when the end fails: the server hears no more of it (zmq.Again).
    assert answer["half a layer"][0] == "Again"
    assert answer["pending"] == ["model.layers.1.self_attn.qkv_proj"]
    assert answer["pushed a"] == a
