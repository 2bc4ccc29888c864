"""What a checksum of bytes is: integer arithmetic that wraps, hence equal on every device.

    words    bytes, 64 bits a word, little-endian, zeros up to a whole block of 512 words
    block    two sums over its words, of the products of their halves, each plus a key:
             NH of UMAC (RFC 4418, 5.2), the second with the keys moved on by one (Toeplitz)
    tensor   both sums of a block, mixed with each other and its position, and summed

Sums do not care in which order, or by how many threads, they are formed. Two blocks that differ
have equal sums for one choice of keys in 2^64 at most. The keys are fixed, so this holds for
bytes that were not chosen to collide.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Final

import torch
from torch import Tensor

BLOCK: Final = 512  # words
BLOCK_BYTES: Final = 8 * BLOCK

_HALF: Final = (1 << 32) - 1
_ALIGNED: Final = 16  # bytes, as a GPU reads them at once
# On the host, what a chunk becomes stays in the cache of a core; on a GPU, launches count.
_HOST_BLOCKS, _DEVICE_BLOCKS = 64, 1 << 14


def signed(word: int) -> int:
    """The int64 that has these 64 bits."""
    return word - (1 << 64) if word >> 63 else word


# Of SplitMix64, whose permutation is David Stafford's "Mix13".
SEED: Final = 0x666C617368717561
_STEP: Final = signed(0x9E3779B97F4A7C15)
_FIRST, _SECOND = signed(0xBF58476D1CE4E5B9), signed(0x94D049BB133111EB)


def keys(device: torch.device) -> Tensor:
    """The keys `[BLOCK + 1]`, int64: what SplitMix64 draws from a fixed seed.

    They are made where they are needed. What was kept on a GPU, a sleeping engine may discard.
    """
    place = torch.arange(BLOCK + 1, dtype=torch.int64, device=device)
    return _mixed(SEED + place * _STEP)


def sums(tensor: Tensor) -> Tensor:
    """Both sums of a contiguous tensor's bytes, `[2]` int64 on its device; zeros if it has none."""
    total = torch.zeros(2, dtype=torch.int64, device=tensor.device)
    start, drawn = 0, keys(tensor.device)
    for words in _chunks(tensor):
        total += _of_blocks(words, start, drawn)
        start += len(words)
    return total


def raw(tensor: Tensor) -> Tensor:
    """The bytes of a contiguous tensor, `[nbytes]` uint8, where they lie."""
    flat = tensor.detach().as_strided((tensor.numel(),), (1,))  # one element has any stride
    return flat.view(torch.uint8)


def whole(data: Tensor, multiple: int) -> Tensor:
    """Bytes as words: a copy, with zeros behind it, where they are not aligned or not as many."""
    missing = -data.numel() % multiple
    if missing or data.storage_offset() % _ALIGNED:
        data = torch.cat([data, data.new_zeros(missing)])
    return data.view(torch.int64)


def _chunks(tensor: Tensor) -> Iterator[Tensor]:
    """Some blocks `[blocks, BLOCK]` at a time."""
    data = raw(tensor)
    few = _HOST_BLOCKS if data.device.type == "cpu" else _DEVICE_BLOCKS
    for start in range(0, data.numel(), few * BLOCK_BYTES):
        piece = data[start : start + few * BLOCK_BYTES]
        yield whole(piece, BLOCK_BYTES).view(-1, BLOCK)


def _of_blocks(words: Tensor, start: int, drawn: Tensor) -> Tensor:
    """What some blocks add to the sums, the first of which has position `start`."""
    low, high = words & _HALF, (words >> 32) & _HALF
    first, second = (
        (((low + k) & _HALF) * ((high + (k >> 32)) & _HALF)).sum(1)
        for k in (drawn[:BLOCK], drawn[1:])
    )
    position = torch.arange(start + 1, start + 1 + len(words), device=words.device)
    first = _mixed(first + position * _STEP)
    second = _mixed(second ^ first)
    return torch.stack([second.sum(), _mixed(first + second).sum()])


def _mixed(words: Tensor) -> Tensor:
    """A permutation of 64 bits in which each bit of the result depends on all of them."""
    words = (words ^ _right(words, 30)) * _FIRST
    words = (words ^ _right(words, 27)) * _SECOND
    return words ^ _right(words, 31)


def _right(words: Tensor, by: int) -> Tensor:
    """A shift that brings in zeros, whatever the sign."""
    return (words >> by) & ((1 << (64 - by)) - 1)
