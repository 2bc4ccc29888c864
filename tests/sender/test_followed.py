"""Sums are followed from one value of a tensor to the next, to the bit, in C and in torch."""

from __future__ import annotations

import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from flashquant.schemes import Region
from flashquant.schemes.fingerprints import definition
from flashquant.sender import eager, native

KERNELS = [eager, *filter(None, [native._believed()])]


@settings(deadline=None, max_examples=60)
@given(
    kernels=st.sampled_from(KERNELS),
    dtype=st.sampled_from([torch.int8, torch.bfloat16, torch.float32]),
    numel=st.sampled_from([1, 3, 15, 16, 17, 511, 513, 2047, 2049, 9001]),
    share=st.sampled_from([0.0, 0.002, 0.03, 0.5, 1.0]),
    seed=st.integers(0, 1 << 16),
)
def test_sums_follow_what_changes_from_one_tensor_to_the_next(kernels, dtype, numel, share, seed):
    dice = torch.Generator().manual_seed(seed)
    old = torch.empty(numel * dtype.itemsize, dtype=torch.uint8).random_(generator=dice)
    new = torch.where(torch.rand(len(old), generator=dice) < share, old + 1, old).view(dtype)
    region = Region(new, Region.of(old).blocks)

    kernels.compared(old.view(dtype), new, region)

    assert region.sums == tuple(definition.sums(new).tolist())
    assert torch.equal(region.blocks, definition.blocks(new))
