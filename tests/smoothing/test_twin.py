"""What a W8A8 twin was smoothed by, read off its codes."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import Tensor

from flashquant.errors import ProfileError
from flashquant.profiles.making import Factors, Producer, Site, factors_of_twins

Weights = dict[str, Tensor]
K, WIDE = 64, 96
QKV = Site(
    (Producer("l.0.norm.weight", 0, K), Producer("l.0.norm.bias", 0, K)), ("l.0.qkv.weight",)
)
UP = Site((Producer("l.0.norm2.weight", 0, K),), ("l.0.gate_up.weight",))
GEMMA = Site((Producer("l.0.norm2.weight", 0, K, 1.0),), ("l.0.gate_up.weight",))
DOWN = Site(
    (Producer("l.0.gate_up.weight", WIDE, 2 * WIDE), Producer("l.0.gate_up.bias", WIDE, 2 * WIDE)),
    ("l.0.down.weight",),
)
SHAPES = {
    "embed.weight": (50, K),
    "l.0.norm.weight": (K,),
    "l.0.norm.bias": (K,),
    "l.0.qkv.weight": (3 * K, K),
    "l.0.o.weight": (K, K),
    "l.0.norm2.weight": (K,),
    "l.0.gate_up.weight": (2 * WIDE, K),
    "l.0.gate_up.bias": (2 * WIDE,),
    "l.0.down.weight": (K, WIDE),
}


def model(seed: int = 0) -> Weights:
    """Names that no architecture has, a fused layer, biases."""
    dice = torch.Generator().manual_seed(seed)
    return {
        name: (
            torch.randn(shape, generator=dice) * 0.1
            if len(shape) == 2
            else torch.rand(shape, generator=dice) + 0.5
        ).bfloat16()
        for name, shape in SHAPES.items()
    }


def smoothed(weights: Weights, sites: list[Site], noise: float = 0.0) -> tuple[Weights, Factors]:
    """The W8A8 twin of a model, and by what it was smoothed."""
    dice = torch.Generator().manual_seed(1)
    factors = Factors()
    for site in sites:
        by = torch.empty(site.channels).uniform_(0.3, 3, generator=dice)
        factors.smooth(site, by, {name: shape[0] for name, shape in SHAPES.items()})
    twin: Weights = {}
    for name, weight in weights.items():
        rows, offset = factors.rows.get(name), factors.offsets.get(name, 0)
        moved = weight.float() + offset
        if rows is not None:
            moved = moved * rows.view(-1, *[1] * (moved.dim() - 1))
        moved = (moved - offset) * factors.columns.get(name, 1)
        if name.startswith("l.") and weight.dim() == 2:
            scale = moved.abs().amax(1, keepdim=True) / 127.5
            off = noise * torch.randn(moved.shape, generator=dice)
            twin[name] = (moved / scale + off).round().clamp(-128, 127).to(torch.int8)
            twin[f"{name}_scale"] = scale
        else:
            twin[name] = moved.to(weight.dtype)
    return twin, factors


@pytest.mark.parametrize(
    ("sites", "noise"),
    [([QKV, UP, DOWN], 0.0), ([QKV, GEMMA, DOWN], 0.0), ([UP], 0.0), ([], 0.0), ([QKV, DOWN], 2.0)],
    ids=["all", "a norm of 1 + w", "one", "none", "noise, as of GPTQ"],
)
def test_the_factors_are_found_whatever_the_names_are(sites: list[Site], noise: float):
    weights = model()
    twin, wanted = smoothed(weights, sites, noise)

    found, scales = factors_of_twins(weights, twin)

    assert found.columns.keys() == wanted.columns.keys()
    assert found.rows.keys() == wanted.rows.keys()
    assert found.offsets == wanted.offsets
    for have, want in ((found.columns, wanted.columns), (found.rows, wanted.rows)):
        for name, factor in want.items():
            torch.testing.assert_close(have[name], factor, rtol=0.02 + noise / 50, atol=0)
    assert torch.equal(scales["l.0.o.weight"], twin["l.0.o.weight_scale"].flatten())


def test_columns_are_those_of_the_norm_to_the_bit():
    """What a push multiplies a norm by, it divides the columns by: nothing is left over."""
    weights = model()
    twin, _ = smoothed(weights, [QKV])

    found, _ = factors_of_twins(weights, twin)

    ratio = twin["l.0.norm.weight"].float() / weights["l.0.norm.weight"].float()
    torch.testing.assert_close(found.columns["l.0.qkv.weight"], 1 / ratio, rtol=1e-6, atol=0)


def test_dead_channels_zero_rows_and_zero_norms_harm_nobody():
    weights = model()
    weights["l.0.norm.weight"][3] = 0
    weights["l.0.qkv.weight"][:, 5] = 0
    weights["l.0.gate_up.weight"][WIDE + 7] = 0
    twin, wanted = smoothed(weights, [QKV, UP, DOWN])
    twin["l.0.gate_up.weight_scale"][WIDE + 7] = 1e-9

    found, _ = factors_of_twins(weights, twin)

    for factor in (*found.columns.values(), *found.rows.values()):
        assert (factor.isfinite() & (factor > 0)).all()
    # What a zero cannot tell, the columns do.
    torch.testing.assert_close(
        found.rows["l.0.norm.weight"][3], wanted.rows["l.0.norm.weight"][3], rtol=0.02, atol=0
    )


def _another_model(weights: Weights, twin: Weights) -> None:
    twin |= smoothed(model(seed=9), [QKV])[0]


def _columns_of_nobody(weights: Weights, twin: Weights) -> None:
    by = torch.linspace(0.3, 3, K)
    moved = weights["l.0.o.weight"].float() * by
    scale = moved.abs().amax(1, keepdim=True) / 127.5
    twin["l.0.o.weight"] = (moved / scale).round().clamp(-128, 127).to(torch.int8)
    twin["l.0.o.weight_scale"] = scale


def _rows_for_nobody(weights: Weights, twin: Weights) -> None:
    twin["l.0.o.weight_scale"] = twin["l.0.o.weight_scale"] * torch.linspace(0.3, 3, K)[:, None]


def _one_column(weights: Weights, twin: Weights) -> None:
    """A single channel, which the middle one says nothing of."""
    weights["l.0.o.weight"][:, 7] /= 8


def _norm_for_nobody(weights: Weights, twin: Weights) -> None:
    twin["l.0.norm2.weight"][5] *= 2


def _no_codes(weights: Weights, twin: Weights) -> None:
    twin.clear()
    twin |= weights


def _fewer(weights: Weights, twin: Weights) -> None:
    del twin["l.0.norm2.weight"]


def _shorter(weights: Weights, twin: Weights) -> None:
    weights["l.0.o.weight"] = weights["l.0.o.weight"][:8]


@pytest.mark.parametrize(
    ("spoil", "says"),
    [
        (_another_model, "so they are not of the same model"),
        (_columns_of_nobody, "the columns of l.0.o.weight are scaled in the twin, and neither"),
        (_rows_for_nobody, "rows or columns of l.0.o.weight are scaled in the twin"),
        (_one_column, "rows or columns of l.0.o.weight are scaled in the twin"),
        (_norm_for_nobody, "l.0.norm2.weight is another one in the twin, and no layer"),
        (_no_codes, "holds no int8 codes"),
        (_fewer, "l.0.norm2.weight is only in one of the two"),
        (_shorter, r"l.0.o.weight is \[8, 64\], and \[64, 64\] in the twin"),
    ],
)
def test_what_is_no_twin_is_refused(spoil: Callable[[Weights, Weights], None], says: str):
    weights = model()
    twin, _ = smoothed(weights, [QKV])
    spoil(weights, twin)

    with pytest.raises(ProfileError, match=says):
        factors_of_twins(weights, twin)
