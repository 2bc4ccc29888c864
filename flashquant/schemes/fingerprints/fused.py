"""The sums as a Triton kernel, for GPUs: each byte is read once, and nothing waits.

Imported only where there is a GPU: Triton is not a dependency.
"""

from __future__ import annotations

import functools

import torch
import triton
import triton.language as tl
from torch import Tensor

from flashquant.schemes.fingerprints import definition, native
from flashquant.schemes.fingerprints.definition import BLOCK

_ROWS = 4  # blocks of one program
_OPTIONS = {"num_warps": 4, "enable_fp_fusion": False}
_BLOCK: tl.constexpr = tl.constexpr(BLOCK)
_SEED: tl.constexpr = tl.constexpr(definition.SEED)
_STEP: tl.constexpr = tl.constexpr(0x9E3779B97F4A7C15)
_FIRST: tl.constexpr = tl.constexpr(0xBF58476D1CE4E5B9)
_SECOND: tl.constexpr = tl.constexpr(0x94D049BB133111EB)


def sums(tensor: Tensor) -> Tensor:
    """`definition.sums`, for a contiguous tensor on a GPU."""
    total = torch.zeros(2, dtype=torch.int64, device=tensor.device)
    if not tensor.numel():
        return total
    # Aligned, and a multiple of 16 words: so it is compiled once, and loads are of 16 bytes.
    words = definition.whole(definition.raw(tensor), 128)
    if words.data_ptr() % 16:
        words = words.clone()
    blocks = triton.cdiv(words.numel(), BLOCK)
    grid = (triton.cdiv(blocks, _ROWS),)
    _add_sums[grid](words, total, words.numel(), ROWS=_ROWS, **_OPTIONS)
    return total


@functools.cache
def difference(device: torch.device) -> str | None:
    """The first case in which sums taken there are not those of the definition on the host."""
    for data in native.hard_bytes():
        there = torch.cat([data.new_zeros(8), data]).to(device)
        for start in (0, 8, 5):  # aligned, by a word, and not at all
            if sums(there[start:]).tolist() != definition.sums(there.cpu()[start:]).tolist():
                return f"{data.numel()} bytes"
    return None


@triton.jit
def _key(place):
    """As a table of them would have to be kept on the device, or brought there."""
    return _mixed(place.to(tl.uint64) * _STEP + _SEED)


@triton.jit
def _product(words, keys):
    """Of the halves of each word, each plus its key in 32 bits."""
    low = words.to(tl.uint32) + keys.to(tl.uint32)
    high = (words >> 32).to(tl.uint32) + (keys >> 32).to(tl.uint32)
    return low.to(tl.uint64) * high.to(tl.uint64)


@triton.jit
def _mixed(words):
    words = (words ^ (words >> 30)) * _FIRST
    words = (words ^ (words >> 27)) * _SECOND
    return words ^ (words >> 31)


@triton.jit
def _add_sums(words_ptr, total_ptr, n_words, ROWS: tl.constexpr):
    """Program i owns the blocks from i * ROWS on."""
    block = tl.program_id(0).to(tl.int64) * ROWS + tl.arange(0, ROWS)
    place = tl.arange(0, _BLOCK)
    at = block[:, None] * _BLOCK + place[None, :]
    words = tl.load(words_ptr + at, mask=at < n_words, other=0).to(tl.uint64, bitcast=True)
    first = tl.sum(_product(words, _key(place)[None, :]), axis=1)
    second = tl.sum(_product(words, _key(place + 1)[None, :]), axis=1)
    first = _mixed(first + (block + 1).to(tl.uint64) * _STEP)
    second = _mixed(second ^ first)
    last = _mixed(first + second)
    inside = block * _BLOCK < n_words
    second = tl.where(inside, second, 0).to(tl.int64, bitcast=True)
    last = tl.where(inside, last, 0).to(tl.int64, bitcast=True)
    tl.atomic_add(total_ptr, tl.sum(second))
    tl.atomic_add(total_ptr + 1, tl.sum(last))
