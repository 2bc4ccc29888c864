"""The sums in C, for host memory: `words.c`, built and believed as `schemes.native` does it."""

from __future__ import annotations

import ctypes
import functools
import logging
from collections.abc import Iterator
from pathlib import Path
from typing import Final

import torch
from torch import Tensor

from flashquant.schemes.build import BuildError, built
from flashquant.schemes.fingerprints import definition
from flashquant.schemes.native import wanted

logger = logging.getLogger(__name__)

SOURCES: Final = tuple(Path(__file__).parent / name for name in ("words.c", "words.h"))
_HOST: Final = torch.device("cpu")


class Kernel:
    """`definition.sums` in C, and what it is made of."""

    def __init__(self, library: ctypes.CDLL) -> None:
        """Raises AttributeError where a kernel is missing."""
        self._sums, self._blocks, self._closed = (
            getattr(library, name) for name in ("sums_of", "blocks_of", "closed_of")
        )
        pointer, size = ctypes.c_void_p, ctypes.c_int64
        self._sums.argtypes = self._blocks.argtypes = [pointer, size, pointer, pointer]
        self._closed.argtypes = [pointer, size, pointer]
        for call in (self._sums, self._blocks, self._closed):
            call.restype = None
        self._kept = definition.keys(_HOST)
        self._keys = self._kept.data_ptr()

    def sums(self, tensor: Tensor) -> tuple[int, int]:
        """Both sums of a contiguous tensor in host memory, as int64."""
        found = (ctypes.c_int64 * 2)()
        self._sums(tensor.data_ptr(), tensor.nbytes, self._keys, found)
        return found[0], found[1]

    def blocks(self, tensor: Tensor) -> Tensor:
        """`definition.blocks`."""
        count = -(-tensor.nbytes // definition.BLOCK_BYTES)
        found = torch.empty((count, 2), dtype=torch.int64, device=_HOST)
        self._blocks(tensor.data_ptr(), tensor.nbytes, self._keys, found.data_ptr())
        return found

    def closed(self, blocks: Tensor) -> tuple[int, int]:
        """`definition.closed` of all blocks of a tensor."""
        found = (ctypes.c_int64 * 2)()
        self._closed(blocks.data_ptr(), len(blocks), found)
        return found[0], found[1]


@functools.cache
def kernel() -> Kernel | None:
    """The kernel of this machine, built and believed; None where there is none."""
    if not wanted():
        return None
    try:
        found = Kernel(ctypes.CDLL(str(built(SOURCES))))
    except (BuildError, OSError, AttributeError) as reason:
        logger.info("digests are taken by torch, several times slower than in C: %s", reason)
        return None
    if (strange := difference(found)) is None:
        return found
    logger.error(
        "the sums of %s, built by this machine's C compiler, differ from their definition, so "
        "torch takes digests instead. Please report the compiler and the CPU.",
        strange,
    )
    return None


def difference(found: Kernel) -> str | None:
    """The first case in which the kernel's sums are not those of the definition."""
    for data in hard_bytes():
        right, blocks = definition.sums(data).tolist(), found.blocks(data)
        same = torch.equal(blocks, definition.blocks(data)) and list(found.closed(blocks)) == right
        if list(found.sums(data)) != right or not same:
            return f"{data.numel()} bytes"
    return None


def hard_bytes() -> Iterator[Tensor]:
    """Bytes on the host around every length that is a limit, with all bits set among them."""
    dice = torch.Generator().manual_seed(0)
    block = definition.BLOCK_BYTES
    for size in (0, 1, 7, 8, 9, block - 1, block, block + 1, 5 * block + 77, 130 * block):
        data = torch.empty(size, dtype=torch.uint8, device=_HOST).random_(0, 256, generator=dice)
        data[16:32] = 255
        yield data
