"""What a checksum of bytes is: integer arithmetic that wraps, hence equal on every device.

    words    bytes, 64 bits a word, little-endian, zeros up to a whole block of 512 words
    block    two sums over its words, of the products of their halves, each plus a key:
             NH of UMAC (RFC 4418, 5.2), the second with the keys moved on by one (Toeplitz)
    tensor   both sums of a block, mixed with each other and its position, and summed

Whoever keeps the sums of the blocks can tell those of the tensor after a few words have changed,
from these words alone: `shift`, then `closed`.

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
        total += closed(_of_blocks(words, drawn), start)
        start += len(words)
    return total


def blocks(tensor: Tensor) -> Tensor:
    """Both sums of each block of a contiguous tensor's bytes, `[blocks, 2]` int64."""
    drawn = keys(tensor.device)
    found = [_of_blocks(words, drawn) for words in _chunks(tensor)]
    return torch.cat([torch.zeros(0, 2, dtype=torch.int64, device=tensor.device), *found])


def closed(blocks: Tensor, start: int = 0) -> Tensor:
    """What some blocks add to the sums of a tensor, `[2]`; the first of them has position
    `start`."""
    position = torch.arange(start + 1, start + 1 + len(blocks), device=blocks.device)
    first = _mixed(blocks[:, 0] + position * _STEP)
    second = _mixed(blocks[:, 1] ^ first)
    return torch.stack([second.sum(), _mixed(first + second).sum()])


def words(tensor: Tensor) -> Tensor:
    """The words of a contiguous tensor's bytes, the last one filled up with zeros; a copy where
    they are not aligned or not whole."""
    return whole(raw(tensor), 8)


def shift(blocks: Tensor, at: Tensor, before: Tensor, after: Tensor) -> None:
    """Some words have changed: bring the sums of their blocks up to date.

    Args:
        blocks: the sums, as of `blocks`.
        at: which words changed, each once.
        before, after: what these were, and are.

    """
    drawn, block, place = keys(blocks.device), at // BLOCK, at % BLOCK
    for column, moved in enumerate((drawn[:BLOCK], drawn[1:])):
        key = moved[place]
        blocks[:, column].index_add_(0, block, _product(after, key) - _product(before, key))


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


def _of_blocks(words: Tensor, drawn: Tensor) -> Tensor:
    """Both sums of some blocks of words, `[blocks, 2]`."""
    return torch.stack([_product(words, moved).sum(1) for moved in (drawn[:BLOCK], drawn[1:])], 1)


def _product(words: Tensor, keys: Tensor) -> Tensor:
    """Of the halves of each word, each plus its key in 32 bits."""
    low, high = words & _HALF, words >> 32
    return ((low + keys) & _HALF) * ((high + (keys >> 32)) & _HALF)


def _mixed(words: Tensor) -> Tensor:
    """A permutation of 64 bits in which each bit of the result depends on all of them."""
    words = (words ^ _right(words, 30)) * _FIRST
    words = (words ^ _right(words, 27)) * _SECOND
    return words ^ _right(words, 31)


def _right(words: Tensor, by: int) -> Tensor:
    """A shift that brings in zeros, whatever the sign."""
    return (words >> by) & ((1 << (64 - by)) - 1)
