"""Which scheme a stored parameter asks for."""

from __future__ import annotations

import pytest
import torch

from flashquant.errors import UnsupportedEngine
from flashquant.schemes import (
    fp8_channel,
    fp8_tensor_rows,
    holds_codes,
    int8_channel,
    quantizer,
)


@pytest.mark.parametrize(
    ("dtype", "scheme"), [(torch.int8, int8_channel), (torch.float8_e4m3fn, fp8_channel)]
)
def test_codes_with_one_scale_a_row_are_channel_schemes(dtype, scheme):
    codes = torch.empty(4, 8, dtype=dtype, device="meta")
    scales = torch.empty(4, 1, device="meta")
    weight = torch.linspace(-1, 1, 32).view(4, 8).bfloat16()

    stored = quantizer(codes, scales, "w")(weight)

    expected = scheme(weight)
    assert torch.equal(stored[0].view(torch.uint8), expected[0].view(torch.uint8))
    assert torch.equal(stored[1], expected[1])


def test_an_engine_by_tensor_fills_its_scales_and_leaves_int8_alone():
    weight = torch.linspace(-1, 1, 32).view(4, 8).bfloat16()
    scales = torch.empty(4, 1, device="meta")

    def made(dtype):
        codes = torch.empty(4, 8, dtype=dtype, device="meta")
        return quantizer(codes, scales, "w", "fp8_tensor")(weight)[1]

    assert torch.equal(made(torch.float8_e4m3fn), fp8_tensor_rows(weight)[1])
    assert torch.equal(made(torch.int8), int8_channel(weight)[1])


@pytest.mark.parametrize(
    ("dtype", "codes"),
    [
        (torch.int8, True),
        (torch.float8_e4m3fn, True),
        (torch.bfloat16, False),
        (torch.float32, False),
        (torch.int32, False),
    ],
)
def test_only_eight_bit_numbers_are_codes(dtype, codes):
    assert holds_codes(dtype) is codes


@pytest.mark.parametrize("shape", [(1,), (), (4,), (1, 1), (2, 1), (4, 2)], ids=str)
def test_any_other_shape_of_scales_is_refused_with_a_way_out(shape):
    codes = torch.empty(4, 8, dtype=torch.int8)

    with pytest.raises(UnsupportedEngine, match=r"mlp\.weight .*FLASHRL_CONFIG=fp8_vllm"):
        quantizer(codes, torch.empty(shape), "mlp.weight")


def test_codes_without_scales_are_refused():
    with pytest.raises(UnsupportedEngine, match=r"scales of shape None.*Serve a checkpoint"):
        quantizer(torch.empty(4, 8, dtype=torch.int8), None, "mlp.weight")


def test_stacked_experts_are_not_taken_for_rows():
    codes, scales = torch.empty(4, 8, 16, dtype=torch.int8), torch.empty(4, 1)

    with pytest.raises(UnsupportedEngine, match="one scale an output channel"):
        quantizer(codes, scales, "experts.w13_weight")
