"""Host memory that one update after the other keeps its copies in.

The C library hands large blocks back to the system when they are freed, and a process pays for
each page that it touches anew: for an undo log that was a quarter of a whole reload. What an
update has kept is therefore reserved for the next; as long as the engine sleeps, it is not.

From a GPU, copies go to pinned memory, so that nothing waits for them. torch rounds each block of
that up to a power of two, and keeps it: so it is asked for powers of two only, which are
carved up, and asked to give them back.

Or they take no memory at all: as long as no step can run, the engine lends that of its KV cache.
"""

from __future__ import annotations

import mmap
from collections.abc import Sequence
from typing import Final

import torch
from torch import Tensor

_CHUNK: Final = 64 << 20  # a power of two
_PAGE: Final = 2 << 20  # a huge one: touched in one go
_ALIGNMENT: Final = 64
_SMALL: Final = 4 << 10  # the C library has room for as little between other blocks


class Reserve:
    """Chunks of host memory between two updates; as many as the largest one took.

    Attributes:
        lent: memory that the engine does not need before the update under way is over, in bytes,
            on the device of its weights.

    """

    def __init__(self) -> None:
        self.lent: tuple[Tensor, ...] = ()
        self._chunks: dict[bool, list[Tensor]] = {False: [], True: []}  # by whether it is pinned

    @property
    def nbytes(self) -> int:
        """Bytes held at the moment, of which those never touched take no memory, if not pinned."""
        return sum(chunk.nbytes for chunks in self._chunks.values() for chunk in chunks)

    def take(self, least: int, *, pinned: bool = False) -> Tensor:
        """A chunk of at least so many bytes, the smallest there is; the caller's until `put`."""
        chunks = self._chunks[pinned]
        fitting = [place for place, chunk in enumerate(chunks) if chunk.nbytes >= least]
        if fitting:
            return chunks.pop(min(fitting, key=lambda place: chunks[place].nbytes))
        if pinned:
            return _pinned(max(_CHUNK, 1 << (least - 1).bit_length()))
        return _mapped(max(_CHUNK, -(-least // _PAGE) * _PAGE))

    def put(self, chunks: Sequence[Tensor], *, pinned: bool = False) -> None:
        """Whoever took these is done with them; they will be taken in the same order."""
        self._chunks[pinned][:0] = chunks

    def clear(self) -> None:
        """Give everything back to the system, and to the engine."""
        self.lent = ()
        was_pinned = bool(self._chunks[True])
        for chunks in self._chunks.values():
            chunks.clear()
        if was_pinned:
            _empty_pinned_cache()


class Copies:
    """Copies of tensors on the host, all freed together.

    Args:
        reserve: where their memory comes from, and goes.
        pinned: whether they are of tensors on a GPU: copied in stream order, without a wait.

    Attributes:
        nbytes: what they take: their own bytes or, of pinned memory, all of the chunks they lie in.

    """

    def __init__(self, reserve: Reserve, *, pinned: bool = False) -> None:
        self._reserve, self._pinned = reserve, pinned
        self._chunks: list[Tensor] = []
        self._used: list[int] = []  # of each chunk
        self._last = 0  # the chunk that the last copy lies in
        self.nbytes = 0

    def of(self, tensor: Tensor) -> Tensor:
        """A copy that is valid until `free`, on the host; of any shape, stride and dtype."""
        if not self._pinned:
            self.nbytes += tensor.nbytes
            if tensor.nbytes < _SMALL:
                return tensor.clone()
        return self._copy(tensor)

    def _copy(self, tensor: Tensor) -> Tensor:
        flat = self._room(tensor.nbytes).view(tensor.dtype)
        if tensor.is_contiguous():
            return flat.view(tensor.shape).copy_(tensor, non_blocking=self._pinned)
        form = torch.empty_like(tensor, device="meta")  # dense, and in the order of the original
        there = flat.as_strided(form.shape, form.stride())
        return there.copy_(tensor, non_blocking=self._pinned)

    def _room(self, nbytes: int) -> Tensor:
        """In the first chunk that has as much left."""
        place = self._with_room(nbytes)
        if place is None:
            self._add(self._reserve.take(nbytes, pinned=self._pinned))
            place = len(self._chunks) - 1
        start, self._last = self._start(place), place
        self._used[place] = start + nbytes
        return self._chunks[place][start : start + nbytes]

    def _with_room(self, nbytes: int) -> int | None:
        """The chunk of the copy before, for there may be one a layer; else the first."""

        def has_room(place: int) -> bool:
            return self._start(place) + nbytes <= self._chunks[place].nbytes

        if self._chunks and has_room(self._last):
            return self._last
        return next(filter(has_room, range(len(self._chunks))), None)

    def _start(self, place: int) -> int:
        """Where the next copy in a chunk begins."""
        return -(-self._used[place] // _ALIGNMENT) * _ALIGNMENT

    def _add(self, chunk: Tensor) -> None:
        if self._pinned:
            self.nbytes += chunk.nbytes
        self._chunks.append(chunk)
        self._used.append(0)

    def free(self) -> None:
        """The copies are no longer read."""
        if self._chunks:
            self._reserve.put(self._chunks, pinned=self._pinned)
            self._chunks, self._used, self._last = [], [], 0


class Borrowed(Copies):
    """Copies in memory that is somebody else's, as long as an update lasts.

    Args:
        chunks: bytes, on one device; zero where nothing is in them that anyone still needs.

    """

    def __init__(self, chunks: Sequence[Tensor]) -> None:
        super().__init__(Reserve())
        for chunk in chunks:
            self._add(chunk)

    def rows_for(self, tensor: Tensor, dim: int) -> int:
        """How many slices along a dimension of a tensor on this device one chunk has room for."""
        if self._with_room(tensor.nbytes) is not None:
            return tensor.shape[dim]
        left = max(chunk.nbytes - self._start(place) for place, chunk in enumerate(self._chunks))
        return max(0, left) * tensor.shape[dim] // tensor.nbytes

    def of(self, tensor: Tensor) -> Tensor:
        """A copy that is valid until `free`, on the same device."""
        self.nbytes += tensor.nbytes
        return self._copy(tensor)

    def free(self) -> None:
        """The copies are no longer read; the memory is zero again, as its owner has it."""
        for place, chunk in enumerate(self._chunks):
            chunk[: self._used[place]].zero_()
            self._used[place] = 0


def _pinned(size: int) -> Tensor:
    """Page-locked memory: about a quarter of a second a GB, once."""
    return torch.empty(size, dtype=torch.uint8, device="cpu", pin_memory=True)


def _empty_pinned_cache() -> None:
    """Let torch give back pinned memory that is no longer held."""
    public = getattr(torch.accelerator, "empty_host_cache", None)  # of newer ones
    empty = public or getattr(torch._C, "_host_emptyCache", None)  # for CUDA only
    if empty is not None:
        empty()


def _mapped(size: int) -> Tensor:
    """Fresh memory, in huge pages where the system has them; a page is taken when it is touched.

    Its own in each process: what one keeps there, a process that was forked off does not overwrite.
    """
    memory = mmap.mmap(-1, size, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
    if hasattr(mmap, "MADV_HUGEPAGE"):
        memory.madvise(mmap.MADV_HUGEPAGE)
    return torch.frombuffer(memory, dtype=torch.uint8)
