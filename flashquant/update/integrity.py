"""None moved: where live tensors are, before and after.

A footprint is where a tensor lives and how it is laid out; captured CUDA graphs
and compiled code have it by heart. What it holds is its fingerprint (schemes/fingerprints).
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import NamedTuple

import torch
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
