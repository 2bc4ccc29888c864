"""e4m3: against a rounding written out again over the 127 values the format has."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from flashquant.errors import MisfitTensor
from flashquant.schemes import WHOLE, check_finite, chunks
from flashquant.schemes.fp8 import fp8_channel, fp8_static, fp8_tensor, fp8_tensor_rows

FLOATS = [torch.bfloat16, torch.float16, torch.float32]
TOP = np.float32(448)


def _value(code: int) -> float:
    exponent, mantissa = code >> 3, code & 7
    return mantissa * 2.0**-9 if exponent == 0 else (8 + mantissa) * 2.0 ** (exponent - 10)


E4M3 = np.array([_value(code) for code in range(127)])  # ascending, 0 to 448


def e4m3(values: np.ndarray) -> np.ndarray:
    """The nearest code, ties to the even one, clamped at 448; as bytes."""
    size = np.minimum(np.abs(values.astype(np.float64)), 448)
    above = np.searchsorted(E4M3, size).clip(1, 126)
    down, up = size - E4M3[above - 1], E4M3[above] - size
    tie_goes_up = above % 2 == 0
    code = np.where((up < down) | ((up == down) & tie_goes_up), above, above - 1)
    return (code | np.where(np.signbit(values), 128, 0)).astype(np.uint8)


def as_bytes(codes: Tensor) -> np.ndarray:
    return codes.view(torch.uint8).numpy()


def gaussian(rows: int, columns: int, dtype: torch.dtype, seed: int = 0) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return (torch.randn(rows, columns, generator=generator) * 0.02).to(dtype)


def every_mantissa_under_every_peak() -> Tensor:
    """bf16 values of [2^-6, 2) in 128 rows, each clipped at a peak of its own in [1, 2)."""
    values = torch.arange(0x3C80, 0x4000, dtype=torch.int16).view(torch.bfloat16)
    return torch.minimum(values[None, :], values[-128:, None])


weights = st.builds(
    lambda rows, columns, dtype, magnitude, seed: (
        gaussian(rows, columns, torch.float32, seed) * 2.0**magnitude
    ).to(dtype),
    st.integers(1, 9),
    st.integers(1, 40),
    st.sampled_from(FLOATS),
    st.integers(-12, 12),
    st.integers(0, 2**16),
)


@given(weights)
@settings(deadline=None)
def test_a_channel_is_divided_by_its_own_scale(weight):
    rows = weight.float().numpy()

    codes, scales = fp8_channel(weight)

    peak = np.abs(rows).max(axis=1, keepdims=True)
    expected = np.maximum(peak / TOP, np.float32(1 / (448 * 512)))
    assert np.array_equal(scales.numpy(), expected)
    assert np.array_equal(as_bytes(codes), e4m3(rows / expected))


@given(weights)
@settings(deadline=None)
def test_a_tensor_is_multiplied_by_the_reciprocal_of_its_scale(weight):
    whole = weight.float().numpy()

    codes, scale = fp8_tensor(weight)

    expected = np.abs(whole).max() / TOP
    assert scale.shape == (1,)
    assert scale.item() == expected
    assert np.array_equal(as_bytes(codes), e4m3(whole * (np.float32(1) / expected)))


@given(weight=weights, scale=st.floats(2.0**-20, 2.0**4, width=32))
@settings(deadline=None)
def test_a_given_scale_is_multiplied_by_its_reciprocal(weight, scale):
    codes = fp8_static(weight, torch.tensor([scale]))

    inverse = np.float32(1) / np.float32(scale)
    assert np.array_equal(as_bytes(codes), e4m3(weight.float().numpy() * inverse))


def test_a_channel_is_divided_where_a_reciprocal_would_round_differently():
    rows = every_mantissa_under_every_peak().float().numpy()

    codes, scales = fp8_channel(every_mantissa_under_every_peak())

    reciprocal = np.float32(1) / scales.numpy()
    assert np.array_equal(as_bytes(codes), e4m3(rows / scales.numpy()))
    assert (as_bytes(codes) != e4m3(rows * reciprocal)).any()


def test_a_given_scale_is_multiplied_where_a_division_would_round_differently():
    weight = every_mantissa_under_every_peak()
    _, scales = fp8_channel(weight)

    codes = fp8_static(weight, scales)

    reciprocal = np.float32(1) / scales.numpy()
    assert np.array_equal(as_bytes(codes), e4m3(weight.float().numpy() * reciprocal))
    assert (as_bytes(codes) != e4m3(weight.float().numpy() / scales.numpy())).any()


def test_every_code_of_the_format_comes_back_as_itself():
    values = torch.tensor(np.concatenate([E4M3, -E4M3]), dtype=torch.float32).view(1, -1)

    codes, scales = fp8_channel(values)

    assert scales.item() == 1
    assert codes.float().tolist() == values.tolist()


def test_channel_codes_and_scales_have_the_shapes_and_dtypes_of_the_kernels():
    codes, scales = fp8_channel(gaussian(5, 8, torch.bfloat16))

    assert (codes.shape, codes.dtype) == ((5, 8), torch.float8_e4m3fn)
    assert (scales.shape, scales.dtype) == ((5, 1), torch.float32)
    assert codes.is_contiguous()


def test_a_given_scale_may_be_one_a_row():
    weight, scales = gaussian(4, 8, torch.bfloat16), torch.tensor([[1.0], [2.0], [0.5], [4.0]])

    codes = fp8_static(weight, scales)

    rows = [fp8_static(weight[i : i + 1], scales[i]) for i in range(4)]
    assert np.array_equal(as_bytes(codes), as_bytes(torch.cat(rows)))


@pytest.mark.parametrize("dtype", FLOATS, ids=str)
def test_a_given_scale_may_be_a_scalar(dtype):
    weight, scale = gaussian(64, 64, dtype), torch.tensor(3.7e-5)

    codes = fp8_static(weight, scale)

    assert np.array_equal(as_bytes(codes), as_bytes(fp8_static(weight, scale.reshape(1))))


def test_what_is_beyond_a_given_scale_is_clamped_to_448():
    codes = fp8_static(torch.tensor([[1000.0, -1000.0, 448.0]]), torch.tensor([1.0]))

    assert codes.float().tolist() == [[448, -448, 448]]


def test_a_channel_of_zeros_has_codes_0_and_the_smallest_scale():
    weight = gaussian(3, 8, torch.bfloat16)
    weight[1] = 0

    codes, scales = fp8_channel(weight)

    assert codes[1].float().eq(0).all()
    assert scales[1].item() == np.float32(1 / (448 * 512))


def as_vllm_stores_it(tensor: Tensor, scale: Tensor) -> np.ndarray:
    """fmaxf(-448, fminf(x * (1 / scale), 448)) of csrc/quantization/w8a8/fp8/common.cuh, where
    fminf of NaN and a number is the number."""
    with np.errstate(divide="ignore", over="ignore", invalid="ignore"):
        product = tensor.float().numpy() * (np.float32(1) / scale.numpy())
    return e4m3(np.fmax(-TOP, np.fmin(product, TOP)))


def test_a_tensor_of_zeros_has_codes_of_448_and_scale_0_as_in_vllm():
    codes, scale = fp8_tensor(torch.zeros(2, 8, dtype=torch.bfloat16))

    assert scale.item() == 0
    assert (as_bytes(codes) == 0x7E).all()
    assert (codes.float() * scale).eq(0).all()


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32], ids=str)
@pytest.mark.parametrize("exponent", range(-45, -34))
def test_a_tensor_of_any_tiny_size_has_the_codes_that_vllm_stores(exponent, dtype):
    """Below 1.3e-36, the reciprocal of the scale overflows."""
    tiny = (gaussian(4, 9, torch.float32) * 10.0 ** (exponent / 2) * 10.0 ** (exponent / 2)).to(
        dtype
    )
    tiny[1] = 0

    codes, scale = fp8_tensor(tiny)

    assert np.array_equal(as_bytes(codes), as_vllm_stores_it(tiny, scale))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32], ids=str)
def test_channels_of_subnormal_numbers_are_zeros_under_the_smallest_scale(dtype):
    codes, scales = fp8_channel(torch.full((2, 9), 1e-40).to(dtype))

    assert (as_bytes(codes) == 0).all()
    assert (scales == np.float32(1 / (448 * 512))).all()


@pytest.mark.parametrize("shape", [(5,), (2, 3, 4), (0, 4)], ids=str)
def test_a_tensor_of_any_shape_but_a_scalar_has_codes_and_one_scale(shape):
    codes, scale = fp8_tensor(torch.ones(shape))

    assert codes.shape == shape
    assert scale.shape == (1,)


@pytest.mark.parametrize("bad", [float("nan"), float("inf"), float("-inf")])
@pytest.mark.parametrize("dtype", FLOATS, ids=str)
def test_a_channel_that_is_not_finite_has_a_scale_that_is_not(bad, dtype):
    weight = gaussian(4, 8, dtype)
    weight[2, 5] = bad

    _, scales = fp8_channel(weight)

    assert scales.isfinite().flatten().tolist() == [True, True, False, True]


@pytest.mark.parametrize("bad", [float("nan"), float("inf"), float("-inf")])
@pytest.mark.parametrize("dtype", FLOATS, ids=str)
def test_a_tensor_that_is_not_finite_has_a_scale_that_is_not(bad, dtype):
    weight = gaussian(4, 8, dtype)
    weight[2, 5] = bad

    _, scale = fp8_tensor(weight)

    assert not scale.isfinite().any()


@pytest.mark.parametrize("dtype", [torch.float16, torch.float32], ids=str)
@pytest.mark.parametrize("scheme", [fp8_channel, fp8_tensor])
def test_a_weight_is_read_in_its_own_precision(scheme, dtype):
    fine = torch.tensor([[1.0 + 2**-10, 0.25]], dtype=dtype)  # bf16 would read 1.0

    _, scales = scheme(fine)

    assert scales.item() == np.float32(1 + 2**-10) / TOP


@pytest.mark.parametrize("elements", [1, 24, 25, 72, 96, 10**9])
@pytest.mark.parametrize("rows", [1, 3, 7])
@pytest.mark.parametrize("scheme", [fp8_channel, fp8_tensor])
def test_the_size_of_a_chunk_changes_nothing(monkeypatch, scheme, elements, rows):
    weight = gaussian(rows, 24, torch.bfloat16)
    codes, scales = scheme(weight)

    monkeypatch.setattr(chunks, "_CHUNK_ELEMENTS", elements)
    chunked_codes, chunked_scales = scheme(weight)

    assert np.array_equal(as_bytes(chunked_codes), as_bytes(codes))
    assert torch.equal(chunked_scales, scales)


@pytest.mark.parametrize("elements", [1, 48])
def test_the_size_of_a_chunk_changes_nothing_under_given_scales(monkeypatch, elements):
    weight, scales = gaussian(7, 24, torch.bfloat16), torch.rand(7, 1) + 0.001
    codes = fp8_static(weight, scales)

    monkeypatch.setattr(chunks, "_CHUNK_ELEMENTS", elements)

    assert np.array_equal(as_bytes(fp8_static(weight, scales)), as_bytes(codes))


def test_the_weight_itself_is_not_touched():
    weight = gaussian(4, 8, torch.float32)
    before = weight.clone()

    fp8_channel(weight)
    fp8_tensor(weight)

    assert torch.equal(weight, before)


def test_of_all_codes_those_that_are_nan_are_refused():
    for code in range(256):
        codes = torch.zeros(4, 6, dtype=torch.uint8)
        codes[2, 3] = code
        codes = codes.view(torch.float8_e4m3fn)
        if codes.isnan().any():
            with pytest.raises(MisfitTensor, match="NaN"):
                check_finite("w", codes.t())
        else:
            check_finite("w", codes.t())


def test_the_scale_of_a_tensor_stands_in_each_of_its_rows():
    weight = gaussian(5, 24, torch.bfloat16)

    codes, scales = fp8_tensor_rows(weight)

    expected, scale = fp8_tensor(weight)
    assert torch.equal(codes.view(torch.uint8), expected.view(torch.uint8))
    assert scales.shape == (5, 1)
    assert scales.is_contiguous()
    assert (scales == scale).all()


def test_each_expert_has_a_scale_of_its_own():
    weight = gaussian(12, 8, torch.bfloat16).view(3, 4, 8) * torch.tensor([1, 2, 4])[:, None, None]

    codes, scales = WHOLE["fp8_tensor"](weight.bfloat16())

    assert scales.shape == (3, 4, 1)
    for expert, (one, its) in enumerate(zip(codes, scales, strict=True)):
        expected, scale = fp8_tensor_rows(weight.bfloat16()[expert])
        assert torch.equal(one.view(torch.uint8), expected.view(torch.uint8))
        assert torch.equal(its, scale)
