"""int4, one scale a group of columns: against arithmetic done again in numpy."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from flashquant.errors import MisfitTensor
from flashquant.schemes import DEFINITIONS, chunks, int4_refreshed
from flashquant.schemes.int4 import check_int4, int4_group

FLOATS = [torch.bfloat16, torch.float16, torch.float32]


def again(weight: Tensor, group: int) -> tuple[np.ndarray, np.ndarray]:
    """scale = bf16(absmax / 7.5), code = clamp(round_half_even(w / scale), -8, 7), in float32."""
    columns = weight.to(torch.float32).numpy().reshape(len(weight), -1, group)
    exact = np.abs(columns).max(axis=2, keepdims=True) / np.float32(7.5)
    scales = torch.from_numpy(exact).bfloat16().float().numpy()
    scales[scales < 2.0**-126] = 1
    codes = np.clip(np.rint(columns / scales), -8, 7).astype(np.int8)
    return codes.reshape(weight.shape), scales.squeeze(2)


def gaussian(rows: int, columns: int, dtype: torch.dtype, seed: int = 0) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return (torch.randn(rows, columns, generator=generator) * 0.02).to(dtype)


@given(
    rows=st.integers(1, 9),
    groups=st.integers(1, 5),
    group=st.sampled_from([2, 8, 32]),
    dtype=st.sampled_from(FLOATS),
    magnitude=st.integers(-20, 12),
    seed=st.integers(0, 2**16),
)
@settings(deadline=None)
def test_codes_and_scales_are_the_arithmetic_of_the_docstring(
    rows, groups, group, dtype, magnitude, seed
):
    weight = gaussian(rows, groups * group, torch.float32, seed)
    weight = (weight * 2.0**magnitude).to(dtype)

    codes, scales = int4_group(weight, group=group)

    expected_codes, expected_scales = again(weight, group)
    assert np.array_equal(codes.numpy(), expected_codes)
    assert np.array_equal(scales.float().numpy(), expected_scales)


def test_what_is_held_of_each_group_sets_its_scale_and_the_rest_is_clipped():
    weight = gaussian(6, 64, torch.bfloat16)
    held = torch.tensor([[60, 100]]).repeat(6, 1).to(torch.uint8)

    codes, scales = int4_refreshed(weight, None, None, held, group=32)

    whole, _ = again(weight, 32)
    peak = weight.float().view(6, 2, 32).abs().amax(2)
    expected = (peak * (held.float() / 100) / torch.tensor(7.5)).bfloat16()
    assert torch.equal(scales, expected)
    assert np.array_equal(codes[:, 32:].numpy(), whole[:, 32:])
    assert set(codes[:, :32].abs().amax(1).tolist()) <= {7, 8}
    assert (codes[:, :32] == -8).sum() + (codes[:, :32] == 7).sum() > 6


def test_a_group_of_zeros_has_codes_of_zeros_and_a_scale_that_can_be_divided_by():
    weight = torch.zeros(2, 64)
    weight[1, 40] = 1e-40

    codes, scales = int4_group(weight, group=32)

    assert not codes.any()
    assert (scales == 1).all()


@pytest.mark.parametrize("wrong", [torch.nan, torch.inf, -torch.inf])
def test_a_scale_tells_of_what_is_not_finite(wrong: float):
    weight = torch.ones(2, 64)
    weight[1, 40] = wrong

    _, scales = int4_group(weight, group=32)

    assert scales.isfinite().tolist() == [[True, True], [True, False]]


def test_a_group_reaches_both_ends_of_the_codes():
    weight = 7.5 * torch.linspace(-1, 1, 128).repeat(2, 1)

    codes, _ = int4_group(weight, group=128)

    assert (int(codes.min()), int(codes.max())) == (-8, 7)


def test_chunks_and_given_memory_change_nothing(monkeypatch: pytest.MonkeyPatch):
    weight = gaussian(37, 96, torch.bfloat16)
    expected = int4_group(weight, group=32)
    into = torch.full((37, 96), 99, dtype=torch.int8)

    monkeypatch.setattr(chunks, "_CHUNK_ELEMENTS", 300)
    made = int4_group(weight, into, group=32)

    assert made[0] is into
    assert all(torch.equal(one, other) for one, other in zip(made, expected, strict=True))


@pytest.mark.parametrize(("scheme", "columns"), [("int4", 2), ("int4_g32", 8), ("int4_channel", 1)])
def test_each_name_has_its_group(scheme: str, columns: int):
    assert DEFINITIONS[scheme](torch.ones(3, 256))[1].shape == (3, columns)


def test_experts_are_quantized_each_like_a_matrix():
    stack = gaussian(12, 64, torch.bfloat16).view(3, 4, 64)

    codes, scales = int4_group(stack, group=32)

    for expert in range(3):
        alone = int4_group(stack[expert], group=32)
        assert torch.equal(codes[expert], alone[0])
        assert torch.equal(scales[expert], alone[1])


def test_columns_that_are_no_whole_groups_are_refused():
    with pytest.raises(ValueError, match="576 columns are no multiple of groups of 128"):
        int4_group(torch.ones(2, 576), group=128)


@pytest.mark.parametrize("code", [8, -9])
def test_codes_that_four_bits_do_not_hold_are_refused(code: int):
    codes = torch.tensor([[7, -8, code]], dtype=torch.int8)

    check_int4("w", codes[:, :2])
    with pytest.raises(MisfitTensor, match=r"w holds codes from -?[0-9]+ to"):
        check_int4("w", codes)
