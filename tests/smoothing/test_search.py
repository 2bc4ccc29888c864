"""Strengths: what large channels cost, and what dividing them saves."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from flashquant.errors import ProfileError
from flashquant.profiles.making import Producer, Site
from flashquant.profiles.making.search import Seen, choose, factors_of, smoothing, watch
from tests.smoothing.test_discovery import TOKENS, tiny

SITE = Site((Producer("norm.weight", 0, 16),), ("a.weight", "b.weight"))


def drawn() -> tuple[Seen, dict[str, torch.Tensor]]:
    dice = torch.Generator().manual_seed(0)
    rows = torch.randn(64, 16, generator=dice)
    rows[:, 3] *= 60  # an outlier
    weights = {name: torch.randn(12, 16, generator=dice) * 0.05 for name in SITE.consumers}
    return Seen(rows.abs().amax(0), rows), weights


def in_numpy(x: np.ndarray, weights: list[np.ndarray], by: np.ndarray) -> float:
    """The relative error of all outputs, worked out without torch."""

    def rounded(rows: np.ndarray) -> np.ndarray:
        scale = np.abs(rows).max(axis=1, keepdims=True) / 127
        return np.rint(rows / scale) * scale

    off = size = 0.0
    for weight in weights:
        exact = x @ weight.T
        off += ((rounded(x / by) @ rounded(weight * by).T - exact) ** 2).sum()
        size += (exact**2).sum()
    return float(np.sqrt(off / size))


def test_an_outlier_is_divided_and_the_error_is_the_one_that_was_meant():
    seen, weights = drawn()

    chosen = choose(SITE, seen, weights)

    x, w = seen.rows.double().numpy(), [weight.double().numpy() for weight in weights.values()]
    assert chosen.by[3] >= 8 * chosen.by.median()
    assert chosen.error == pytest.approx(in_numpy(x, w, chosen.by.double().numpy()), rel=1e-3)
    assert chosen.error_without == pytest.approx(in_numpy(x, w, np.ones(16)), rel=1e-3)
    assert chosen.error < chosen.error_without / 2


def test_the_best_strength_is_taken():
    seen, weights = drawn()

    best = choose(SITE, seen, weights)

    for strength in (0.0, 0.5, 1.0):
        assert best.error <= choose(SITE, seen, weights, [strength]).error


def test_where_nothing_helps_nothing_is_divided():
    seen = Seen(torch.ones(16), torch.ones(4, 16))
    weights = {name: torch.ones(3, 16) for name in SITE.consumers}

    chosen = choose(SITE, seen, weights)

    assert chosen.strength is None
    assert torch.equal(chosen.by, torch.ones(16))
    assert factors_of([chosen], {"norm.weight": torch.ones(16)}).columns == {}


def test_factors_are_powers_of_two_about_one():
    seen, weights = drawn()
    columns = weights["a.weight"].abs().amax(0)

    by = smoothing(seen.peaks, columns, 0.7)

    exponents = by.log2()
    assert torch.equal(exponents, exponents.round())
    assert exponents.median() == 0
    norm = torch.randn(16).bfloat16()
    assert torch.equal((norm / by).bfloat16() * by, norm.float())  # exact, in bf16


@pytest.mark.parametrize("side", ["activations", "weights"])
def test_a_dead_channel_is_left_alone(side):
    peaks, columns = torch.full((8,), 3.0), torch.full((8,), 0.1)
    (peaks if side == "activations" else columns)[5] = 0

    assert smoothing(peaks, columns, 0.5)[5] == 1


def test_what_is_all_zeros_is_left_alone():
    assert torch.equal(smoothing(torch.zeros(4), torch.zeros(4), 0.5), torch.ones(4))


def test_both_sides_of_a_site_are_scaled_the_other_way_round():
    seen, weights = drawn()
    chosen = choose(SITE, seen, weights)

    factors = factors_of([chosen], {"norm.weight": torch.ones(16)})

    assert torch.equal(factors.rows["norm.weight"] * factors.columns["a.weight"], torch.ones(16))
    assert torch.equal(factors.columns["a.weight"], factors.columns["b.weight"])


def test_watching_sees_every_token_and_keeps_some():
    model = tiny("Llama", {})
    name = "model.layers.0.mlp.down_proj"
    site = Site((Producer("model.layers.0.mlp.up_proj.weight", 0, 128),), (f"{name}.weight",))
    read: list[torch.Tensor] = []
    layer = model.get_submodule(name)
    handle = layer.register_forward_pre_hook(lambda _, inputs: read.append(inputs[0][0]))

    found = watch(model, [site], [TOKENS, TOKENS + 24])[site]

    handle.remove()
    assert torch.equal(found.peaks, torch.cat(read).abs().amax(0).detach())
    assert found.rows.shape == (48, 128)
    assert {tuple(row) for row in found.rows.tolist()} == {
        tuple(row) for row in torch.cat(read).tolist()
    }


def test_an_empty_calibration_set_is_refused():
    with pytest.raises(ProfileError, match="is empty"):
        watch(tiny("Llama", {}), [], [])
