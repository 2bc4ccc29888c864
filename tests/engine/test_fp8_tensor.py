"""`fp8_tensor` on the real engine: FlashRL's scale a tensor, on the kernel of channels."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from torch import Tensor

import flashquant
from flashquant.errors import MisfitTensor
from tests.engine.serving import FP8_CHANNEL, Serving, serve
from tools.models.policies import FP8, Policies

pytestmark = [pytest.mark.engine, FP8_CHANNEL]

SHARDS = [f"model.layers.0.self_attn.{name}_proj.weight" for name in "qkv"]
HERE = "model.layers.0.self_attn.qkv_proj"


@pytest.fixture(scope="module")
def policies(tmp_path_factory: pytest.TempPathFactory) -> Policies:
    return Policies(tmp_path_factory.mktemp("policies"), "qwen2")


@pytest.fixture(scope="module")
def live(policies: Policies) -> Serving:
    return serve(policies.bf16("a"), "fp8_tensor")


def by_hand(weights: dict[str, Tensor]) -> tuple[Tensor, Tensor]:
    """Codes and scales of a fused layer, written without the library on purpose."""
    codes, scales = [], []
    for name in SHARDS:
        weight = weights[name].float()
        scale = weight.abs().max() / torch.tensor(448.0)
        codes.append((weight * (1 / scale)).clamp(-448, 448).to(torch.float8_e4m3fn))
        scales.append(scale.expand(len(weight), 1))
    return torch.cat(codes), torch.cat(scales)


def test_each_tensor_of_a_fused_layer_has_one_scale_in_all_of_its_rows(
    live: Serving, policies: Policies
) -> None:
    weights = policies.tensors("b")
    weights |= {name: weights[name] * 2**i for i, name in enumerate(SHARDS)}  # maxima may be equal
    flashquant.reload_weights(live.llm, weights)
    codes, scales = by_hand(weights)

    held = live.model.get_submodule(HERE)

    assert torch.equal(held.weight_scale.flatten(), scales.flatten())
    assert len(held.weight_scale.unique()) == 3
    assert torch.equal(held.weight.t().contiguous().view(torch.uint8), codes.view(torch.uint8))


def test_nan_in_one_tensor_leaves_no_trace(live: Serving, policies: Policies) -> None:
    flashquant.reload_weights(live.llm, policies.tensors("a"))
    broken = policies.tensors("b")
    broken[SHARDS[1]][3, 5] = float("nan")

    for _ in range(2):  # the second time by the fast path of names that are known
        with pytest.raises(MisfitTensor, match=r"k_proj\S* holds NaN"):
            flashquant.reload_weights(live.llm, broken)
        live.snapshot().assert_same(live.start)


def test_an_engine_that_starts_on_dummy_weights_serves_what_is_pushed(
    policies: Policies, tmp_path: Path
) -> None:
    """FlashRL's default for this scheme."""
    config = tmp_path / "dummy.yaml"
    config.write_text(json.dumps({"configs": [{"fn": "fp8_tensor", "load_format": "dummy"}]}))
    dummy = Serving(policies.bf16("a"), str(config))

    flashquant.reload_weights(dummy.llm, policies.tensors("b"))

    fresh = serve(policies.bf16("b"), "fp8_tensor").start
    different = dummy.snapshot().different_from(fresh)
    # vLLM's dummy load fills the scales of a KV cache, too, which a cache in bf16 does not use.
    assert [name for name in different if "self_attn.attn._" not in name] == []


def test_a_checkpoint_of_codes_is_served_as_it_is(policies: Policies) -> None:
    """FlashRL's way: the engine starts on a quantized model, and the trainer pushes bf16."""
    stored = serve(policies.served("a", FP8), "fp8_tensor")
    by_channel = serve(policies.served("a", FP8), "fp8_channel")
    assert stored.start.digest == by_channel.start.digest

    flashquant.reload_weights(stored.llm, policies.tensors("b"))

    stored.snapshot().assert_same(serve(policies.bf16("b"), "fp8_tensor").start)
