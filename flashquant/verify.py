"""All arrived, none moved, and what it all adds up to.

A footprint is where a tensor lives and how it is laid out; captured CUDA graphs
and compiled code have it by heart. A fingerprint is what it holds, a digest what
a whole model holds; two engines that serve the same policy in the same scheme
have equal digests.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import NamedTuple

import torch
import xxhash
from torch import Tensor

from flashquant.errors import MovedTensor


class Footprint(NamedTuple):
    """Where one live tensor is and how it is laid out."""

    address: int
    shape: tuple[int, ...]
    stride: tuple[int, ...]
    dtype: torch.dtype

    @classmethod
    def of(cls, tensor: Tensor) -> Footprint:
        return cls(tensor.data_ptr(), tuple(tensor.shape), tensor.stride(), tensor.dtype)


def footprints(live: Iterable[tuple[str, Tensor]]) -> dict[str, Footprint]:
    """The footprint of every live tensor, by name."""
    return {name: Footprint.of(tensor) for name, tensor in live}


def check_unmoved(before: Mapping[str, Footprint], after: Mapping[str, Footprint]) -> None:
    """Raise unless every live tensor is where and what it was.

    Raises:
        MovedTensor: names how many moved, and the first one with both footprints.

    """
    moved = [name for name in before if after.get(name) != before[name]]
    moved += [name for name in after if name not in before]
    if not moved:
        return
    first = moved[0]
    raise MovedTensor(
        f"{len(moved)} live tensors moved during the reload, first {first}: was "
        f"{before.get(first)}, is {after.get(first)}. Captured graphs and compiled code still read "
        "the old memory; restart the engine and report this layer."
    )


def digests(contents: Iterable[tuple[str, Tensor | str]]) -> dict[str, str]:
    """The fingerprint of each thing the kernels read, by name."""
    return {name: fingerprint(value) for name, value in contents}


def digest(parts: Mapping[str, str]) -> str:
    """One fingerprint of many, of their names and of their order."""
    state = xxhash.xxh3_128()
    for name, part in parts.items():
        state.update(f"{len(name)} {name} {len(part)} {part} ".encode())
    return str(state.hexdigest())


def fingerprint(value: Tensor | str) -> str:
    """The xxh3 (128 bit, hex) of a tensor's layout, dtype and values.

    A string stands for memory whose bytes are out of reach: the fingerprint of what
    was packed into it.
    """
    if isinstance(value, str):
        return value
    # An `[N, K]` storage seen through `.t()` is hashed as it lies, without a copy.
    turned = value.dim() == 2 and not value.is_contiguous() and value.t().is_contiguous()
    state = xxhash.xxh3_128(f"{tuple(value.shape)} {value.dtype} {turned} ".encode())
    state.update(_bytes(value.t() if turned else value))
    return str(state.hexdigest())


def _bytes(tensor: Tensor) -> memoryview:
    """The elements as the host sees them, in logical order, without a copy if possible."""
    flat = tensor.detach().contiguous().flatten()
    if flat.numel() == 1:
        flat = flat.clone(memory_format=torch.contiguous_format)  # an expanded scale has stride 0
    flat = flat.view(torch.uint8).cpu()
    return memoryview(flat.numpy())  # type: ignore[arg-type]  # numpy's stubs miss Buffer
