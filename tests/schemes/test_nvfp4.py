"""NVFP4: against the arithmetic of compressed-tensors, whose checkpoints hold the same."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from flashquant.schemes import largest, nvfp4_matrix

BY_CODE = torch.tensor([0.0, 0.5, 1.0, 1.5, 2.0, 3.0, 4.0, 6.0])


def weight(kind: str) -> Tensor:
    dice = torch.Generator().manual_seed(0)
    if kind == "many sizes":  # down to scales that e4m3 does not have, and a row of zeros
        made = torch.randn(131, 384, generator=dice) * torch.logspace(-6, 2, 131)[:, None]
        made[7] = 0
        return made.bfloat16()
    if kind == "zeros":
        return torch.zeros(4, 32).bfloat16()
    if kind == "tiny":
        return torch.randn(8, 32, generator=dice) * 1e-37
    return torch.randn(64, 64, generator=dice).to(getattr(torch, kind))


@pytest.mark.parametrize("kind", ["many sizes", "bfloat16", "float16", "float32", "zeros", "tiny"])
def test_every_bit_is_what_compressed_tensors_stores(kind: str) -> None:
    formats = pytest.importorskip("compressed_tensors.quantization")
    helpers = pytest.importorskip("compressed_tensors.quantization.utils.helpers")
    rounding = pytest.importorskip("compressed_tensors.quantization.quant_args")
    packing = pytest.importorskip("compressed_tensors.compressors.nvfp4.helpers")
    stored_as = formats.QuantizationArgs(
        num_bits=4,
        type="float",
        strategy="tensor_group",
        group_size=16,
        symmetric=True,
        scale_dtype=torch.float8_e4m3fn,
    )
    sent = weight(kind)
    values = sent.float()
    groups = values.view(len(values), -1, 16)
    divisor = helpers.generate_gparam(values.min(), values.max())
    scales, _ = helpers.calculate_qparams(
        groups.amin(-1), groups.amax(-1), stored_as, global_scale=divisor
    )
    scaled = (groups / (scales / divisor)[..., None]).view(values.shape)
    ends = torch.tensor(-6.0), torch.tensor(6.0)
    rounded = rounding.round_to_quantized_type_args(scaled, stored_as, *ends)

    codes, our_scales, our_divisor = nvfp4_matrix(sent)

    assert torch.equal(our_divisor, divisor)
    assert torch.equal(our_scales.float(), scales.float())
    assert torch.equal(codes, packing.pack_fp4_to_uint8(rounded))


def test_ties_go_to_even_codes_and_the_first_of_two_lies_low() -> None:
    ties = [0.25, 0.75, 1.25, 1.75, 2.5, 3.5, 5.0, 6.0]
    row = torch.tensor([ties + [-tie for tie in ties]])

    codes, scales, divisor = nvfp4_matrix(row)

    assert (scales.float() / divisor).item() == 1.0
    halves = torch.stack([codes & 15, codes >> 4], -1).flatten().long()
    values = BY_CODE[halves & 7] * torch.where(halves >= 8, -1.0, 1.0)
    nearest = [0.0, 1.0, 1.0, 2.0, 2.0, 4.0, 4.0, 6.0]
    assert values.tolist() == nearest + [-value for value in nearest]


def test_matrices_that_share_a_peak_share_the_divisor() -> None:
    q, k = weight("bfloat16"), weight("bfloat16") * 5
    peak = torch.maximum(largest(q), largest(k))

    both = nvfp4_matrix(torch.cat([q, k]))

    for part, rows in ((q, slice(0, 64)), (k, slice(64, 128))):
        codes, scales, divisor = nvfp4_matrix(part, peak)
        assert torch.equal(divisor, both[2])
        assert torch.equal(codes, both[0][rows])
        assert torch.equal(scales.view(torch.uint8), both[1][rows].view(torch.uint8))


def test_the_default_dtype_changes_no_bit() -> None:
    """VLLM sets it to that of the model while it loads and processes one."""
    sent = weight("bfloat16")
    expected = nvfp4_matrix(sent)

    before = torch.get_default_dtype()
    torch.set_default_dtype(torch.bfloat16)
    try:
        made = nvfp4_matrix(sent)
    finally:
        torch.set_default_dtype(before)

    for one, other in zip(made, expected, strict=True):
        assert torch.equal(one.view(torch.uint8), other.view(torch.uint8))


def test_columns_that_are_no_whole_groups_are_refused() -> None:
    with pytest.raises(ValueError, match="24 columns are no multiple of groups of 16"):
        nvfp4_matrix(torch.ones(2, 24))
