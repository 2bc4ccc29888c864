"""Memory that two processes see, where a stack has CUDA's IPC.

A handle is what torch makes of a CUDA tensor: a function, and arguments of which the
seventh is the device.
"""

from __future__ import annotations

import math
import os
import tempfile
from collections.abc import Callable, Iterable, Sequence
from typing import Any

import torch
from torch import Tensor

Handle = tuple[Callable[..., Tensor], tuple[Any, ...]]


class Buffer:
    """Bytes to write into, again and again, and the handle by which a worker finds them."""

    def __init__(self, size: int) -> None:
        descriptor, self._path = tempfile.mkstemp(dir="/dev/shm")
        os.close(descriptor)
        os.truncate(self._path, size)
        self.handle = self.as_tensor(torch.uint8, [size])
        self.bytes = mapped(*self.handle[1])

    def as_tensor(self, dtype: torch.dtype, shape: Sequence[int]) -> Handle:
        """The handle of the whole buffer, as a tensor of some form."""
        return mapped, (self._path, dtype, list(shape), *[None] * 3, 0)

    def fill(self, tensors: Iterable[Tensor]) -> list[int]:
        """Lay tensors one after another; the offset of each, in bytes."""
        offsets, end = [], 0
        for tensor in tensors:
            flat = tensor.detach().reshape(-1).view(torch.uint8)
            self.bytes[end : end + flat.numel()] = flat
            offsets.append(end)
            end += flat.numel()
        return offsets

    def spoil(self) -> None:
        """What a trainer does next: the same memory holds something else, here NaN."""
        self.bytes.fill_(0xFF)

    def close(self) -> None:
        os.unlink(self._path)


def mapped(path: str, dtype: torch.dtype, shape: list[int], *_: Any) -> Tensor:
    """The memory itself, in whatever process this is."""
    flat = torch.from_file(path, shared=True, size=math.prod(shape), dtype=dtype)
    return flat.view(shape)
