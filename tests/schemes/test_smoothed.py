"""int8 through a profile: against FlashRL's own lines, and against arithmetic in numpy."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from flashquant.schemes import chunks, scaled
from flashquant.schemes.int8 import int8_channel
from flashquant.schemes.smoothed import int8_frozen, int8_refreshed
from tools.models import flashrl

FLOATS = [torch.bfloat16, torch.float16, torch.float32]


def drawn(rows: int, columns: int, dtype: torch.dtype, seed: int) -> tuple[Tensor, Tensor, Tensor]:
    """A weight, a factor a column, a factor a row: codes of all sizes, some beyond 127."""
    dice = torch.Generator().manual_seed(seed)
    weight = (torch.randn(rows, columns, generator=dice) * 0.05).to(dtype)
    columns_ = torch.empty(columns).uniform_(0.2, 5, generator=dice)
    rows_ = 127 / (0.15 * torch.empty(rows).uniform_(0.5, 2, generator=dice))
    return weight, columns_, rows_


@given(
    rows=st.integers(1, 9),
    columns=st.integers(1, 40),
    dtype=st.sampled_from(FLOATS),
    has=st.sampled_from(["both", "input", "output"]),
    seed=st.integers(0, 2**16),
)
@settings(deadline=None)
def test_frozen_codes_are_flashrls(rows, columns, dtype, has, seed):
    weight, per_column, per_row = drawn(rows, columns, dtype, seed)
    fields = {
        "input_scale": 1.0 if has == "output" else per_column.view(1, -1),
        "output_scale": 1.0 if has == "input" else per_row.view(-1, 1),
        "type": torch.int8,
    }

    codes = int8_frozen(
        weight,
        None if has == "output" else per_column,
        None if has == "input" else per_row,
    ).codes

    assert torch.equal(codes, flashrl.quantize("w", weight, {"w": fields}))


def test_the_order_of_the_products_is_flashrls():
    """Another one gives other codes, if rarely: so it is worth a test on many."""
    weight, per_column, per_row = drawn(1024, 1024, torch.bfloat16, 0)
    numbers = weight.float().numpy(), per_row[:, None].numpy(), per_column.numpy()

    codes = int8_frozen(weight, per_column, per_row).codes

    def stored(product: np.ndarray) -> np.ndarray:
        return np.clip(np.rint(product), -128, 127).astype(np.int8)

    w, r, c = numbers
    assert np.array_equal(codes.numpy(), stored((w * r) * c))
    assert not np.array_equal(codes.numpy(), stored((w * c) * r))


@pytest.mark.parametrize("dtype", FLOATS, ids=str)
def test_a_norm_is_multiplied_in_float32_and_stored_in_its_own_dtype(dtype):
    norm, factor = torch.rand(64).to(dtype), torch.rand(64) + 0.5
    fields = {"input_scale": factor, "output_scale": 1.0, "type": torch.bfloat16}

    stored = scaled(norm, factor, None).bfloat16()

    assert torch.equal(stored, flashrl.quantize("n", norm, {"n": fields}))


def test_what_outgrows_a_frozen_scale_is_clipped():
    weight = torch.tensor([[200.0, -200.0, 126.5, 127.5]])

    codes, clipped, peak = int8_frozen(weight, None, torch.ones(1))

    assert codes.tolist() == [[127, -128, 126, 127]]
    assert clipped == 2  # the maximum of a row lies at 127.5, by how such scales are made
    assert peak == np.float32(200) / np.float32(127)


@given(rows=st.integers(1, 9), columns=st.integers(1, 40), seed=st.integers(0, 2**16))
@settings(deadline=None)
def test_refreshed_codes_are_int8_channel_of_the_smoothed_weight(rows, columns, seed):
    weight, per_column, per_row = drawn(rows, columns, torch.bfloat16, seed)
    of_checkpoint = torch.rand(rows, 1) + 0.1

    codes, scales = int8_refreshed(weight, per_column, per_row, of_checkpoint)

    wanted, counted = int8_channel(weight * per_row[:, None] * per_column)
    assert torch.equal(codes, wanted)
    assert torch.equal(scales, of_checkpoint * counted)


def test_a_row_of_zeros_and_a_dead_column_have_codes_of_zero():
    weight, per_column, per_row = drawn(4, 8, torch.bfloat16, 0)
    weight[1], weight[:, 2] = 0, 0

    frozen = int8_frozen(weight, per_column, per_row).codes
    codes, scales = int8_refreshed(weight, per_column, per_row, torch.ones(4, 1))

    for found in (frozen, codes):
        assert not found[1].any()
        assert not found[:, 2].any()
        assert found[0].any()
    assert scales[1].item() == np.float32(1) / np.float32(127)


def test_chunks_change_nothing(monkeypatch):
    weight, per_column, per_row = drawn(50, 32, torch.bfloat16, 1)
    scale = torch.rand(50, 1) + 0.1
    frozen = int8_frozen(weight, per_column, per_row)
    refreshed = int8_refreshed(weight, per_column, per_row, scale)

    monkeypatch.setattr(chunks, "_CHUNK_ELEMENTS", 7 * 32)

    again = (
        *int8_frozen(weight, per_column, per_row),
        *int8_refreshed(weight, per_column, per_row, scale),
    )
    for one, other in zip(again, (*frozen, *refreshed), strict=True):
        assert torch.equal(one, other)
