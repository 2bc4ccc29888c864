"""What layers cost by themselves and together, and which are kept for a budget."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from flashquant.errors import ProfileError
from flashquant.profiles import Entry, Profile
from flashquant.profiles.making.discovery import linear_layers
from flashquant.profiles.making.sensitivity import Sensitivity, sensitivity
from tests.smoothing.test_discovery import TOKENS, tiny

WORST = "model.layers.1.mlp.down_proj"


@pytest.fixture(scope="module")
def model() -> nn.Module:
    """One layer reads an outlier, so that rounding its tokens costs far more than all others."""
    made = tiny("Llama", {})
    layers = linear_layers(made)
    with torch.no_grad():
        for layer in layers.values():
            layer.weight.copy_((layer.weight * 4).bfloat16())
        layers["model.layers.1.mlp.up_proj"].weight[3] *= 512
        layers[WORST].weight[:, 3] /= 512
    return made


@pytest.fixture(scope="module")
def found(model: nn.Module) -> Sensitivity:
    whole = sensitivity(model, [TOKENS], "int8", 1e9).whole
    return sensitivity(model, [TOKENS], "int8", whole / 2)


def test_layers_that_read_the_same_are_one(found: Sensitivity) -> None:
    block = [cost.layers for cost in found.costs if "layers.0" in cost.layers[0]]
    assert [tuple(name.rpartition(".")[2] for name in layers) for layers in block] == [
        ("q_proj", "k_proj", "v_proj"),
        ("o_proj",),
        ("gate_proj", "up_proj"),
        ("down_proj",),
    ]


def test_the_layer_that_loses_most_is_kept_and_the_budget_met(found: Sensitivity) -> None:
    assert max(found.costs, key=lambda cost: cost.kl).layers == (WORST,)
    assert WORST in found.keep
    assert 0 < found.left <= found.whole / 2
    assert found.kept_part < 0.5


def test_another_budget_needs_no_other_costs(model: nn.Module, found: Sensitivity) -> None:
    tight = found.whole / 8
    anew = sensitivity(model, [TOKENS], "int8", tight)
    phases: set[str] = set()

    again = sensitivity(
        model,
        [TOKENS],
        "int8",
        tight,
        known=found,
        note_progress=lambda phase, _: phases.add(phase),
    )

    assert again == anew
    assert len(again.kept) > len(found.kept)
    assert not any("layer by layer" in phase for phase in phases)


def test_a_cost_is_the_kl_of_the_kernels_arithmetic(model: nn.Module, found: Sensitivity) -> None:
    """Once more in plain torch: int8 codes, a scale a token and a scale a row."""
    layer = linear_layers(model)[WORST]

    def rounded(rows: torch.Tensor) -> torch.Tensor:
        scale = rows.abs().amax(1, keepdim=True) / 127
        return (rows / scale).round() * scale

    def hook(_: nn.Module, inputs: tuple[torch.Tensor], __: torch.Tensor) -> torch.Tensor:
        x = inputs[0]
        return (rounded(x.flatten(0, -2)) @ rounded(layer.weight).T).view(*x.shape[:-1], -1)

    with torch.no_grad():
        p = model(input_ids=TOKENS).logits.log_softmax(-1)
        handle = layer.register_forward_hook(hook)
        q = model(input_ids=TOKENS).logits.log_softmax(-1)
        handle.remove()
    kl = (p.exp() * (p - q)).sum(-1).mean()
    (cost,) = (cost for cost in found.costs if cost.layers == (WORST,))
    assert cost.kl == pytest.approx(float(kl), rel=0.02)


def test_a_profile_smooths_what_is_measured(model: nn.Module, found: Sensitivity) -> None:
    """The outlier's column is multiplied by what the outlier is divided by."""
    weight = linear_layers(model)[WORST].weight
    by = torch.ones(weight.shape[1])
    by[3] = 512
    entry = Entry(torch.int8, by, None)
    smoothed = sensitivity(
        model, [TOKENS], "int8", 1e9, profile=Profile({f"{WORST}.weight": entry}, "here")
    )
    (with_it,) = (cost for cost in smoothed.costs if cost.layers == (WORST,))
    (without,) = (cost for cost in found.costs if cost.layers == (WORST,))
    assert with_it.kl < without.kl / 4


def test_a_budget_that_is_met_keeps_nothing_and_leaves_the_model_alone(model: nn.Module) -> None:
    with torch.no_grad():
        before = model(input_ids=TOKENS).logits
    assert sensitivity(model, [TOKENS], "int4_g32", 1e9).keep == []
    with torch.no_grad():
        assert torch.equal(model(input_ids=TOKENS).logits, before)


@pytest.mark.parametrize("scheme", ["fp8_channel", "fp8_tensor", "fp8_vllm", "int4_channel"])
def test_a_budget_that_nothing_meets_keeps_everything(model: nn.Module, scheme: str) -> None:
    found = sensitivity(model, [TOKENS], scheme, 1e-12)
    assert found.kept_part == 1
    assert found.left == 0


@pytest.mark.parametrize(
    ("scheme", "budget", "says"),
    [("nvfp4", 0.1, "not known here; it is for int8"), ("int8", 0.0, "a budget of 0")],
)
def test_what_cannot_be_measured_is_refused(
    model: nn.Module, scheme: str, budget: float, says: str
) -> None:
    with pytest.raises(ProfileError, match=says):
        sensitivity(model, [TOKENS], scheme, budget)


def test_experts_in_one_tensor_are_refused_by_name() -> None:
    small = {"num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 32}
    mixture = tiny("Qwen3Moe", {**small, "head_dim": 16})
    with pytest.raises(
        ProfileError, match=r"layers\.0\.mlp\.experts has its experts in one tensor"
    ):
        sensitivity(mixture, [TOKENS], "int8", 1.0)
