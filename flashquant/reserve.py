"""Host memory that one update after the other keeps its copies in.

The C library hands large blocks back to the system when they are freed, and a process pays for
each page that it touches anew: for an undo log that was a quarter of a whole reload. What an
update has kept is therefore reserved for the next; as long as the engine sleeps, it is not. From
a GPU, copies go to pinned memory, which torch reserves by itself.
"""

from __future__ import annotations

import mmap
from collections.abc import Sequence
from typing import Final

import torch
from torch import Tensor

_CHUNK: Final = 64 << 20
_PAGE: Final = 2 << 20  # a huge one: touched in one go
_ALIGNMENT: Final = 64
_SMALL: Final = 4 << 10  # the C library has room for as little between other blocks


class Reserve:
    """Chunks of host memory between two updates; as many as the largest one took."""

    def __init__(self) -> None:
        self._chunks: list[Tensor] = []

    @property
    def nbytes(self) -> int:
        """Bytes held at the moment, of which those never touched take no memory."""
        return sum(chunk.nbytes for chunk in self._chunks)

    def take(self, least: int) -> Tensor:
        """A chunk of at least so many bytes, the smallest there is; the caller's until `put`."""
        fitting = [place for place, chunk in enumerate(self._chunks) if chunk.nbytes >= least]
        if fitting:
            return self._chunks.pop(min(fitting, key=lambda place: self._chunks[place].nbytes))
        return _mapped(max(_CHUNK, -(-least // _PAGE) * _PAGE))

    def put(self, chunks: Sequence[Tensor]) -> None:
        """Whoever took these is done with them; they will be taken in the same order."""
        self._chunks[:0] = chunks

    def clear(self) -> None:
        """Give everything back to the system."""
        self._chunks.clear()


class Copies:
    """Copies of tensors on the host, all freed together.

    Args:
        reserve: where their memory comes from, and goes.

    """

    def __init__(self, reserve: Reserve) -> None:
        self._reserve = reserve
        self._chunks: list[Tensor] = []
        self._used = 0

    def of(self, tensor: Tensor) -> Tensor:
        """A copy that is valid until `free`; of any shape, stride and dtype, on the host."""
        if tensor.nbytes < _SMALL:
            return tensor.clone()
        flat = self._room(tensor.nbytes).view(tensor.dtype)
        if tensor.is_contiguous():
            return flat.view(tensor.shape).copy_(tensor)
        form = torch.empty_like(tensor, device="meta")  # dense, and in the order of the original
        return flat.as_strided(form.shape, form.stride()).copy_(tensor)

    def _room(self, nbytes: int) -> Tensor:
        start = -(-self._used // _ALIGNMENT) * _ALIGNMENT
        if not self._chunks or start + nbytes > self._chunks[-1].nbytes:
            self._chunks.append(self._reserve.take(nbytes))
            start = 0
        self._used = start + nbytes
        return self._chunks[-1][start : self._used]

    def free(self) -> None:
        """Nobody reads the copies any more."""
        if self._chunks:
            self._reserve.put(self._chunks)
            self._chunks = []


def _mapped(size: int) -> Tensor:
    """Fresh memory, in huge pages where the system has them; a page is taken when it is touched."""
    memory = mmap.mmap(-1, size)
    if hasattr(mmap, "MADV_HUGEPAGE"):
        memory.madvise(mmap.MADV_HUGEPAGE)
    return torch.frombuffer(memory, dtype=torch.uint8)
