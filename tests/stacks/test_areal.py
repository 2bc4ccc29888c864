"""AReaL 1.0.4: its worker extension over a gloo group of its own making, and from disk.

Not run: its HTTP routes, which only pass these calls on, and its trainer.
"""

from __future__ import annotations

import pytest

from tests.stacks import overlays
from tests.stacks.running import fresh, run
from tools.models.policies import Policies

pytestmark = overlays.needed("areal")


@overlays.on_each_vllm("areal")
@pytest.mark.parametrize("scheme", ["int8", "fp8_vllm"])
def test_what_its_worker_extension_loads_equals_a_fresh_start(
    policies: Policies, scheme: str, vllm: str
) -> None:
    """AReaL catches every exception; what went wrong is in the answer, and changed nothing."""
    answer = run("areal", "areal", policies.bf16("a"), policies.bf16("b"), scheme=scheme, vllm=vllm)

    a, b = fresh("areal", policies, scheme=scheme, vllm=vllm)
    assert answer["started"] == a
    assert all(succeeded for succeeded, _ in answer["broadcast answers"])
    assert answer["broadcast"] == b
    assert answer["disk answers"] == [[True, "Success"]]
    assert answer["disk"] == a
    ((succeeded, says),) = answer["refused"]
    assert not succeeded
    assert "model.norm.weight holds NaN" in says
    assert answer["after refusal"] == a
