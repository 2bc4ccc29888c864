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

SOURCES: Final = (Path(__file__).parent / "words.c",)
_HOST: Final = torch.device("cpu")


class Kernel:
    """`definition.sums` in C."""

    def __init__(self, library: ctypes.CDLL) -> None:
        """Raises AttributeError where the kernel is missing."""
        self._sums = library.sums_of
        self._sums.argtypes = [ctypes.c_void_p, ctypes.c_int64, ctypes.c_void_p, ctypes.c_void_p]
        self._sums.restype = None
        self._kept = definition.keys(_HOST)
        self._keys = self._kept.data_ptr()

    def sums(self, tensor: Tensor) -> tuple[int, int]:
        """Both sums of a contiguous tensor in host memory, as int64."""
        found = (ctypes.c_int64 * 2)()
        self._sums(tensor.data_ptr(), tensor.nbytes, self._keys, found)
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
        if list(found.sums(data)) != definition.sums(data).tolist():
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
