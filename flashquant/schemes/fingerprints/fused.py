"""The sums as a Triton kernel, for GPUs: one launch for many tensors, and nothing waits.

Imported only where there is a GPU: Triton is not a dependency.
"""

from __future__ import annotations

import functools
from collections.abc import Sequence
from itertools import accumulate

import torch
import triton
import triton.language as tl
from torch import Tensor

from flashquant.schemes.fingerprints import definition, native
from flashquant.schemes.fingerprints.definition import BLOCK

_ROWS = 4  # blocks that a program looks at together
_TURNS = 4  # and so many times
_PROGRAM = _ROWS * _TURNS * BLOCK  # words of one
_ALIGNED = 16  # bytes, as a GPU reads them at once
_OPTIONS = {"num_warps": 4, "enable_fp_fusion": False}
_BLOCK: tl.constexpr = tl.constexpr(BLOCK)
_SEED: tl.constexpr = tl.constexpr(definition.SEED)
_STEP: tl.constexpr = tl.constexpr(0x9E3779B97F4A7C15)
_FIRST: tl.constexpr = tl.constexpr(0xBF58476D1CE4E5B9)
_SECOND: tl.constexpr = tl.constexpr(0x94D049BB133111EB)


def sums(tensors: Sequence[Tensor]) -> Tensor:
    """`definition.sums` of contiguous tensors on one GPU, in one launch: `[len(tensors), 2]`."""
    device = tensors[0].device
    total = torch.zeros((len(tensors), 2), dtype=torch.int64, device=device)
    kept = [_aligned(tensor) for tensor in tensors]
    words = [tensor.nbytes // 8 for tensor in kept]
    first = list(accumulate((triton.cdiv(count, _PROGRAM) for count in words), initial=0))
    if first[-1]:
        rows = zip(first, (tensor.data_ptr() for tensor in kept), words, strict=False)
        table = torch.tensor(list(rows), dtype=torch.int64, device="cpu").to(device)
        grid, halvings = (first[-1],), len(tensors).bit_length()
        _add_sums[grid](table, total, len(tensors), halvings, ROWS=_ROWS, TURNS=_TURNS, **_OPTIONS)
    return total


def _aligned(tensor: Tensor) -> Tensor:
    """Itself, or a copy of its bytes that can be read 16 at a time; zeros add nothing."""
    if not (tensor.data_ptr() | tensor.nbytes) % _ALIGNED:
        return tensor
    words = definition.whole(definition.raw(tensor), _ALIGNED)
    return words.clone() if words.data_ptr() % _ALIGNED else words


@functools.cache
def difference(device: torch.device) -> str | None:
    """The first case in which sums taken there are not those of the definition on the host."""
    there = [torch.cat([data.new_zeros(8), data]).to(device) for data in native.hard_bytes()]
    # Aligned, by a word, and not at all.
    cases = [data[start:] for data in there for start in (0, 8, 5)]
    for data, found in zip(cases, sums(cases).tolist(), strict=True):
        if found != definition.sums(data.cpu()).tolist():
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
def _owner(table_ptr, program, n_tensors, halvings):
    """The last tensor whose first program is not behind this one: the one that it works on."""
    low, high = program * 0, program * 0 + n_tensors
    for _ in range(0, halvings):
        middle = (low + high) // 2
        is_behind = tl.load(table_ptr + 3 * middle) > program
        low, high = tl.where(is_behind, low, middle), tl.where(is_behind, middle, high)
    return low


@triton.jit(do_not_specialize=["n_tensors", "halvings"])
def _add_sums(table_ptr, total_ptr, n_tensors, halvings, ROWS: tl.constexpr, TURNS: tl.constexpr):
    """Each program owns ROWS * TURNS blocks of one tensor.

    The table has a row a tensor: its first program, its address, its number of words.
    """
    program = tl.program_id(0).to(tl.int64)
    tensor = _owner(table_ptr, program, n_tensors, halvings)
    first_program = tl.load(table_ptr + 3 * tensor)
    words_ptr = tl.load(table_ptr + 3 * tensor + 1).to(tl.pointer_type(tl.int64))
    words_ptr = tl.multiple_of(words_ptr, 16)
    n_words = tl.multiple_of(tl.load(table_ptr + 3 * tensor + 2), 2)
    start = (program - first_program) * (ROWS * TURNS)
    last = tl.minimum(start + ROWS * TURNS, tl.cdiv(n_words, _BLOCK))
    place = tl.arange(0, _BLOCK)
    keys, moved = _key(place)[None, :], _key(place + 1)[None, :]
    one, other = tl.zeros((ROWS,), tl.int64), tl.zeros((ROWS,), tl.int64)
    for row in range(start, last, ROWS):
        block = row + tl.arange(0, ROWS)
        at = block[:, None] * _BLOCK + place[None, :]
        words = tl.load(words_ptr + at, mask=at < n_words, other=0).to(tl.uint64, bitcast=True)
        first = tl.sum(_product(words, keys), axis=1)
        second = tl.sum(_product(words, moved), axis=1)
        first = _mixed(first + (block + 1).to(tl.uint64) * _STEP)
        second = _mixed(second ^ first)
        both = _mixed(first + second)
        inside = block * _BLOCK < n_words
        one += tl.where(inside, second, 0).to(tl.int64, bitcast=True)
        other += tl.where(inside, both, 0).to(tl.int64, bitcast=True)
    tl.atomic_add(total_ptr + 2 * tensor, tl.sum(one))
    tl.atomic_add(total_ptr + 2 * tensor + 1, tl.sum(other))
