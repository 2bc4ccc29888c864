"""Places at which tensors differ, and the gaps between them: the definition, on any device.

`places.c` is its equal for host memory (native.py). Tensors are contiguous; elements are compared
and copied by their bits.
"""

from __future__ import annotations

import ctypes
from collections.abc import Mapping
from typing import Final

import torch
from torch import Tensor

LIMITS: Final[Mapping[torch.dtype, int]] = {
    torch.uint8: (1 << 8) - 1,
    torch.uint16: (1 << 16) - 1,
    torch.uint32: (1 << 32) - 1,
}
"""Of gaps: the largest number, which stands for as many unchanged elements and no change."""

_WORD: Final = 8  # bytes
_BITS: Final[Mapping[int, torch.dtype]] = {1: torch.uint8, 2: torch.int16, 4: torch.int32}


def flat_bits(tensor: Tensor) -> Tensor:
    """The elements as integers, `[numel]`, in the tensor's own memory."""
    return tensor.detach().view(_BITS[tensor.element_size()]).view(-1)


def differing(old: Tensor, new: Tensor) -> Tensor:
    """Where two tensors differ, ascending; eight bytes at a time first, since most are equal."""
    old, new = flat_bits(old), flat_bits(new)
    many = _WORD // new.element_size()
    if any(tensor.storage_offset() % many for tensor in (old, new)):
        return (old != new).nonzero().flatten()
    whole = new.numel() // many * many
    words = old[:whole].view(torch.int64) != new[:whole].view(torch.int64)
    near = words.nonzero() * many + torch.arange(many, device=new.device)
    here = torch.cat([near.flatten(), torch.arange(whole, new.numel(), device=new.device)])
    return here[old[here] != new[here]]


def sizes(here: Tensor) -> list[int]:
    """How many numbers the gaps between these places take, in 8, 16 and 32 bits."""
    gaps = _gaps(here)
    return [len(gaps) + int((gaps // limit).sum()) for limit in LIMITS.values()]


def packed(here: Tensor, width: torch.dtype, size: int) -> Tensor:
    """The gaps between these places: so many numbers of so many bits."""
    gaps, limit = _gaps(here), LIMITS[width]
    where = torch.arange(len(gaps), device=gaps.device) + (gaps // limit).cumsum(0)
    stored = torch.full((size,), limit, dtype=torch.int64, device=gaps.device)
    stored[where] = gaps % limit
    return stored.to(width)


def unpacked(gaps: Tensor) -> Tensor:
    """The places between which these gaps lie, ascending, int64."""
    wide = gaps.to(torch.int64)
    skips = wide == LIMITS[gaps.dtype]
    here: Tensor = torch.where(skips, wide, wide + 1).cumsum(0) - 1
    return here[~skips]


def span(gaps: Tensor) -> tuple[int, int]:
    """How many places gaps stand for, and the last of them; -1 where there is none."""
    here = unpacked(gaps)
    return len(here), int(here[-1]) if len(here) else -1


def picked(values: Tensor, here: Tensor) -> Tensor:
    """The elements at these places, flat."""
    return flat_bits(values)[here].view(values.dtype)


def gathered(values: Tensor, gaps: Tensor, count: int) -> Tensor:
    """The elements at the places, `count` of them, between which these gaps lie."""
    return picked(values, unpacked(gaps).to(values.device))


def scattered(live: Tensor, gaps: Tensor, values: Tensor) -> None:
    """Overwrite the elements there."""
    put(live, unpacked(gaps), values)


def exchanged(
    live: Tensor, gaps: Tensor, values: Tensor, old: Tensor, done: ctypes.c_int64
) -> None:
    """Overwrite the elements there.

    Args:
        old: takes what they were, before.
        done: 1 from when that is so, and any of them may have been overwritten.

    """
    here = unpacked(gaps)
    flat_bits(old).copy_(flat_bits(picked(live, here.to(live.device))))
    done.value = 1
    put(live, here, values)


def put(live: Tensor, here: Tensor, values: Tensor) -> None:
    """Overwrite the elements at these places."""
    flat_bits(live)[here.to(live.device)] = flat_bits(values).to(live.device)


def _gaps(here: Tensor) -> Tensor:
    return torch.diff(here, prepend=here.new_tensor([-1])) - 1
