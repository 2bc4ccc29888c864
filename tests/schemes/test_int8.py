"""int8, one scale a row: against arithmetic done again in numpy."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from flashquant.schemes import chunks
from flashquant.schemes.int8 import int8_channel

FLOATS = [torch.bfloat16, torch.float16, torch.float32]


def again(weight: Tensor) -> tuple[np.ndarray, np.ndarray]:
    """scale = absmax / 127, code = round_half_even(w * 127 / absmax), in float32.

    A true division: 127 times the reciprocal rounds some codes differently.
    """
    rows = weight.to(torch.float32).numpy()
    peak = np.abs(rows).max(axis=1, keepdims=True)
    peak[peak == 0] = 1
    top = np.float32(127)
    return np.rint(rows * (top / peak)).astype(np.int8), peak / top


def gaussian(rows: int, columns: int, dtype: torch.dtype, seed: int = 0) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return (torch.randn(rows, columns, generator=generator) * 0.02).to(dtype)


@given(
    rows=st.integers(1, 9),
    columns=st.integers(1, 40),
    dtype=st.sampled_from(FLOATS),
    magnitude=st.integers(-20, 12),
    seed=st.integers(0, 2**16),
)
@settings(deadline=None)
def test_codes_and_scales_are_the_arithmetic_of_the_docstring(
    rows, columns, dtype, magnitude, seed
):
    weight = (gaussian(rows, columns, torch.float32, seed) * 2.0**magnitude).to(dtype)

    codes, scales = int8_channel(weight)

    expected_codes, expected_scales = again(weight)
    assert np.array_equal(codes.numpy(), expected_codes)
    assert np.array_equal(scales.numpy(), expected_scales)


def test_a_row_is_multiplied_where_a_division_would_round_differently():
    values = torch.arange(0x3C80, 0x4000, dtype=torch.int16).view(torch.bfloat16)
    weight = torch.minimum(values[None, :], values[-128:, None])  # a peak of its own a row

    codes, scales = int8_channel(weight)

    assert np.array_equal(codes.numpy(), again(weight)[0])
    assert (codes.numpy() != np.rint(weight.float().numpy() / scales.numpy())).any()


def test_codes_and_scales_have_the_shapes_and_dtypes_of_the_kernels():
    codes, scales = int8_channel(gaussian(5, 8, torch.bfloat16))

    assert (codes.shape, codes.dtype) == ((5, 8), torch.int8)
    assert (scales.shape, scales.dtype) == ((5, 1), torch.float32)
    assert codes.is_contiguous()


def test_half_a_code_rounds_to_the_even_one():
    codes, _ = int8_channel(torch.tensor([[127.0, 0.5, 1.5, 2.5, -0.5, -1.5]]))

    assert codes.tolist() == [[127, 0, 2, 2, 0, -2]]


def test_a_row_uses_the_whole_range_and_never_minus_128():
    codes, _ = int8_channel(gaussian(64, 32, torch.bfloat16))

    assert codes.abs().amax(dim=1).eq(127).all()
    assert codes.min() == -127


def test_a_row_of_zeros_has_codes_0_and_scale_one_127th():
    weight = gaussian(3, 8, torch.bfloat16)
    weight[1] = 0

    codes, scales = int8_channel(weight)

    assert codes[1].eq(0).all()
    assert scales[1] == torch.tensor(1.0) / 127


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32], ids=str)
@pytest.mark.parametrize("peak", [1e-45, 9.2e-41, 1.2e-38, 3.7e-37])
def test_a_row_too_small_for_127_over_it_is_a_row_of_zeros(peak, dtype):
    codes, scales = int8_channel(torch.tensor([[peak, -peak, 0.0], [1.0, -1.0, 0.0]]).to(dtype))

    assert codes.tolist() == [[0, 0, 0], [127, -127, 0]]
    assert scales.tolist() == [[np.float32(1) / np.float32(127)]] * 2


def test_the_smallest_row_that_is_no_row_of_zeros():
    peak = np.float32(127) / np.finfo(np.float32).max
    below = np.nextafter(peak, np.float32(0))

    codes, _ = int8_channel(torch.tensor([[peak, -peak], [below, below]]))

    assert codes.tolist() == [[127, -127], [0, 0]]


@pytest.mark.parametrize("bad", [float("nan"), float("inf"), float("-inf")])
@pytest.mark.parametrize("dtype", FLOATS, ids=str)
def test_a_row_that_is_not_finite_has_a_scale_that_is_not(bad, dtype):
    weight = gaussian(4, 8, dtype)
    weight[2, 5] = bad

    _, scales = int8_channel(weight)

    assert scales.isfinite().flatten().tolist() == [True, True, False, True]


@pytest.mark.parametrize("dtype", [torch.float16, torch.float32], ids=str)
def test_a_weight_is_read_in_its_own_precision(dtype):
    fine = torch.tensor([[1.0 + 2**-10, 0.25]], dtype=dtype)  # bf16 would read 1.0

    _, scales = int8_channel(fine)

    assert scales.item() == np.float32(1 + 2**-10) / np.float32(127)


@pytest.mark.parametrize("elements", [1, 24, 25, 72, 96, 10**9])
@pytest.mark.parametrize("rows", [1, 3, 7])
def test_the_size_of_a_chunk_changes_nothing(monkeypatch, elements, rows):
    weight = gaussian(rows, 24, torch.bfloat16)
    whole = int8_channel(weight)

    monkeypatch.setattr(chunks, "_CHUNK_ELEMENTS", elements)
    chunked = int8_channel(weight)

    assert torch.equal(chunked[0], whole[0])
    assert torch.equal(chunked[1], whole[1])


def test_rows_are_quantized_alone():
    weight = gaussian(6, 16, torch.bfloat16)
    codes, scales = int8_channel(weight)

    alone = [int8_channel(row) for row in weight.split(1)]

    assert torch.equal(codes, torch.cat([c for c, _ in alone]))
    assert torch.equal(scales, torch.cat([s for _, s in alone]))


def test_a_transposed_weight_is_quantized_like_its_dense_copy():
    weight = gaussian(16, 6, torch.bfloat16).t()

    codes, scales = int8_channel(weight)

    dense_codes, dense_scales = int8_channel(weight.contiguous())
    assert torch.equal(codes, dense_codes)
    assert torch.equal(scales, dense_scales)


def test_a_weight_without_rows_has_no_codes():
    codes, scales = int8_channel(torch.empty(0, 8, dtype=torch.bfloat16))

    assert codes.shape == (0, 8)
    assert scales.shape == (0, 1)


def test_the_weight_itself_is_not_touched():
    weight = gaussian(4, 8, torch.float32)
    before = weight.clone()

    int8_channel(weight)

    assert torch.equal(weight, before)
