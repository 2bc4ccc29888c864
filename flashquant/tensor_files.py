"""Safetensors files, read by their descriptor into memory of one's own.

Mapped memory belongs to whoever may write the file: where it is cut, or its server forgets it
(NFS), the next look at a tensor ends the process by SIGBUS, engines included. Here that is an
error.
"""

from __future__ import annotations

import ctypes
import json
import math
import os
import weakref
from collections.abc import Callable, Iterator, Mapping
from typing import Any, Final, NamedTuple

import torch
from torch import Tensor

_LENGTH: Final = 8  # bytes that say how long the header is
_LONGEST: Final = 100_000_000  # the format's own limit of a header
_METADATA: Final = "__metadata__"
_DTYPES: Final[Mapping[str, torch.dtype]] = {
    "BOOL": torch.bool,
    "U8": torch.uint8,
    "U16": torch.uint16,
    "U32": torch.uint32,
    "U64": torch.uint64,
    "I8": torch.int8,
    "I16": torch.int16,
    "I32": torch.int32,
    "I64": torch.int64,
    "F16": torch.float16,
    "BF16": torch.bfloat16,
    "F32": torch.float32,
    "F64": torch.float64,
    "C64": torch.complex64,
    "F8_E4M3": torch.float8_e4m3fn,
    "F8_E5M2": torch.float8_e5m2,
    "F8_E8M0": torch.float8_e8m0fnu,
}

Room = Callable[[int], Tensor]


class BrokenFile(OSError):
    """A file is no safetensors file, or is not what it was when it was opened."""


class Written(NamedTuple):
    """What changes when somebody writes into a file, or puts another one in its place."""

    device: int
    inode: int
    size: int
    time: int

    @classmethod
    def of(cls, file: int | str | os.PathLike[str]) -> Written:
        """As it is now."""
        found = os.stat(file)
        return cls(found.st_dev, found.st_ino, found.st_size, found.st_mtime_ns)


class _Held(NamedTuple):
    """One tensor of a file: what it is, and where its bytes begin."""

    dtype: torch.dtype
    shape: tuple[int, ...]
    start: int

    @property
    def nbytes(self) -> int:
        return math.prod(self.shape) * self.dtype.itemsize


class TensorFile(Mapping[str, Tensor]):
    """The tensors of one file, by name; each is read when it is asked for, into new memory.

    Attributes:
        metadata: the texts in its header.
        written: what the file was when it was opened.

    """

    def __init__(self, path: str | os.PathLike[str]) -> None:
        """Raises:
        OSError: it cannot be read, or is no whole safetensors file.

        """
        self._path = path
        # A pipe that nobody writes would be waited for; of a file, this says nothing.
        self._file = os.open(path, os.O_RDONLY | os.O_CLOEXEC | os.O_NONBLOCK)
        self._end = weakref.finalize(self, os.close, self._file)  # also where what follows fails
        try:
            self.written = Written.of(self._file)
            length = int.from_bytes(self._bytes(_LENGTH, 0), "little")
            if length > min(_LONGEST, self.written.size - _LENGTH):
                raise BrokenFile(f"{path}: its header would have {length} bytes")
            self.metadata, self._held = _parsed(
                self._bytes(length, _LENGTH), _LENGTH + length, self.written.size
            )
        except (ValueError, KeyError, TypeError, AttributeError, RecursionError) as wrong:
            raise BrokenFile(f"{path}: its header is none of safetensors: {wrong}") from wrong

    def __getitem__(self, name: str) -> Tensor:
        return self.read(name)

    def __iter__(self) -> Iterator[str]:
        return iter(self._held)

    def __len__(self) -> int:
        return len(self._held)

    def __contains__(self, name: object) -> bool:
        return name in self._held

    def __enter__(self) -> TensorFile:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def close(self) -> None:
        """Nothing more will be read."""
        self._end()

    def form(self, name: str) -> Tensor:
        """Shape and dtype of a tensor, as a meta tensor; nothing is read."""
        held = self._held[name]
        return torch.empty(held.shape, dtype=held.dtype, device="meta")

    def read(self, name: str, room: Room | None = None) -> Tensor:
        """One tensor.

        Args:
            room: gives memory of so many bytes (uint8), which is used in the place of new one.

        Raises:
            OSError: the file was cut since it was opened, or cannot be read any more.

        """
        held = self._held[name]
        if room is None:
            tensor = torch.empty(held.shape, dtype=held.dtype, device="cpu")
        else:
            tensor = room(held.nbytes).view(held.dtype).view(held.shape)
        if held.nbytes:
            memory = (ctypes.c_char * held.nbytes).from_address(tensor.data_ptr())
            self._fill(memoryview(memory).cast("B"), held.start)
        return tensor

    def _bytes(self, size: int, start: int) -> bytearray:
        found = bytearray(size)
        self._fill(memoryview(found), start)
        return found

    def _fill(self, memory: memoryview, start: int) -> None:
        done = 0
        while done < len(memory):
            count = os.preadv(self._file, [memory[done:]], start + done)
            if not count:
                raise BrokenFile(f"{self._path} ends at byte {start + done}: it was cut")
            done += count


def _parsed(header: bytearray, start: int, size: int) -> tuple[dict[str, str], dict[str, _Held]]:
    """The metadata, and the tensors by name, in order.

    Args:
        header: of a file.
        start: where the tensors begin in it.
        size: of the file.

    Raises:
        ValueError, KeyError, TypeError, AttributeError: they are not those of a safetensors file.

    """
    said = json.loads(header.decode(), object_pairs_hook=_each_once)
    metadata = said.pop(_METADATA, None) or {}
    if not all(isinstance(text, str) for text in metadata.values()):
        raise ValueError("its metadata are no texts")
    found, at = dict[str, _Held](), start
    for name, one in sorted(said.items(), key=lambda item: item[1]["data_offsets"]):
        held = _Held(_dtype(one["dtype"]), _sizes(one["shape"]), at)
        begin, at = (start + offset for offset in _sizes(one["data_offsets"]))
        if begin != held.start or at - begin != held.nbytes:
            raise ValueError(f"{name} is not where and as long as it should be")
        found[name] = held
    if at != size:
        raise ValueError(f"its tensors end at byte {at} of {size}")
    return metadata, dict(sorted(found.items()))


def _each_once(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    found = dict(pairs)
    if len(found) != len(pairs):
        raise ValueError("a name in it comes twice")
    return found


def _dtype(name: str) -> torch.dtype:
    if name not in _DTYPES:
        raise ValueError(f"its dtype {name!r} is not known here")
    return _DTYPES[name]


def _sizes(said: Any) -> tuple[int, ...]:
    if not isinstance(said, list) or not all(type(one) is int and one >= 0 for one in said):
        raise ValueError(f"{said!r} are no sizes")
    return tuple(said)
