"""Sums of a tensor that are followed from one value of it to the next.

A few words that change cost what they are, not a pass over all of it.
"""

from __future__ import annotations

from typing import NamedTuple

from torch import Tensor

from flashquant.schemes.fingerprints import definition, quick


class Region(NamedTuple):
    """Memory, and the sums of its blocks.

    Attributes:
        memory: contiguous.
        blocks: `[blocks, 2]` int64, as of `definition.blocks`; 16 bytes for 4 KiB.

    """

    memory: Tensor
    blocks: Tensor

    @classmethod
    def of(cls, memory: Tensor) -> Region:
        """Read it."""
        return cls(memory, quick.blocks(memory))

    @property
    def sums(self) -> tuple[int, int]:
        """`definition.sums` of the memory, on the host."""
        return quick.closed(self.blocks)

    def words(self, at: Tensor) -> Tensor:
        """Some of its words, as they are now."""
        return definition.words(self.memory)[at]

    def shift(self, at: Tensor, before: Tensor, after: Tensor) -> None:
        """These words, each named once, were `before` and are `after`."""
        definition.shift(self.blocks, at, before, after)
