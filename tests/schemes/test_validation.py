"""Values that are not finite, found without waiting for a device in between."""

from __future__ import annotations

import math

import pytest
import torch

from flashquant.errors import MisfitTensor
from flashquant.schemes import Doubts, quick

FP16 = torch.float16
SIZES = [(3,), (70, 1), (5, 8192), (), (1,), (300, 700)]


def doubts(bad: float = 0.0, at: int = 0, place: int = 0) -> Doubts:
    """Many tensors, of which one may hold a number that it should not."""
    found = Doubts()
    for number, size in enumerate(SIZES):
        values = torch.ones(size, dtype=(torch.bfloat16, torch.float32)[number % 2])
        if bad and number == at:
            values.view(-1)[place] = bad
        found.add(f"tensor {number}", values, (FP16,) if number == 2 else ())
    return found


def test_what_is_finite_stands():
    doubts().resolve()
    Doubts().resolve()


@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf])
@pytest.mark.parametrize(
    ("at", "place"), [(0, 2), (1, 0), (1, 69), (2, 5 * 8192 - 1), (3, 0), (5, 123_456)]
)
def test_one_bad_number_anywhere_is_found_and_its_tensor_named(bad, at, place):
    with pytest.raises(MisfitTensor, match=f"tensor {at} holds NaN or infinite"):
        doubts(bad, at, place).resolve()


def test_a_value_is_held_against_what_its_own_tensor_is_stored_as():
    doubts(1e6, at=4).resolve()
    with pytest.raises(
        MisfitTensor, match=r"tensor 2 holds values up to 9.99e\+05, .*torch.float16"
    ):
        doubts(1e6, at=2, place=77).resolve()


@pytest.mark.parametrize("bad", [math.nan, math.inf])
def test_it_is_found_where_torchs_norm_loses_it(bad, monkeypatch):
    monkeypatch.setattr(quick, "get_total_norm", lambda tensors, _: torch.tensor(1.0))
    quick._keeps_nans.cache_clear()

    with pytest.raises(MisfitTensor, match="tensor 5"):
        doubts(bad, at=5, place=9).resolve()
    quick._keeps_nans.cache_clear()
