"""What a module of a real engine makes of a weight at its first pass follows every update."""

from __future__ import annotations

from typing import Any

import pytest
from torch import Tensor
from vllm.model_executor.models import qwen2

import flashquant
from flashquant.errors import ReloadError
from flashquant.patches.layers import made_once
from tests.engine.serving import serve
from tools.models.policies import Policies

pytestmark = pytest.mark.engine


FORWARD = qwen2.Qwen2DecoderLayer.forward


def keeping(self: Any, positions: Tensor, hidden_states: Tensor, residual: Any) -> Any:
    """Scale by the square of the norm's weight, which is computed once."""
    if self.kept is None:
        self.kept = self.input_layernorm.weight.float() ** 2
    hidden_states, residual = FORWARD(self, positions, hidden_states, residual)
    return hidden_states * self.kept.to(hidden_states.dtype), residual


@pytest.fixture(scope="module")
def policies(tmp_path_factory: pytest.TempPathFactory) -> Policies:
    return Policies(tmp_path_factory.mktemp("policies"), "qwen2")


@pytest.fixture
def start(monkeypatch: pytest.MonkeyPatch) -> Any:
    monkeypatch.setattr(qwen2.Qwen2DecoderLayer, "kept", None, raising=False)
    monkeypatch.setattr(qwen2.Qwen2DecoderLayer, "forward", keeping)
    # Anew, of this class.
    monkeypatch.setattr(made_once, "blocks", made_once.blocks.__wrapped__)
    return serve


@pytest.mark.parametrize("scheme", ["bf16", "int8"])
@pytest.mark.parametrize("prepare", [False, True])
def test_a_reload_equals_a_restart(
    start: Any, policies: Policies, scheme: str, prepare: bool
) -> None:
    live, fresh = start(policies.bf16("a"), scheme), start(policies.bf16("b"), scheme)
    flashquant.reload_weights(live.llm, policies.tensors("a"))
    before, expected = live.outputs(), fresh.outputs()

    flashquant.reload_weights(live.llm, policies.tensors("b"), prepare=prepare)

    assert live.outputs() == expected
    assert expected != before


def test_single_pushes_and_failed_ones_leave_what_belongs_to_the_weights(
    start: Any, policies: Policies
) -> None:
    live, fresh = start(policies.bf16("a"), "int8"), start(policies.bf16("b"), "int8")
    flashquant.reload_weights(live.llm, policies.tensors("a"))
    before, expected = live.outputs(), fresh.outputs()
    tensors = policies.tensors("b")
    spoilt = {**tensors, "model.norm.weight": tensors["model.norm.weight"] * float("nan")}

    with pytest.raises(ReloadError):
        flashquant.reload_weights(live.llm, spoilt)
    assert live.outputs() == before

    for name, tensor in tensors.items():
        live.model.load_weights([(name, tensor)])
    assert live.outputs() == expected
