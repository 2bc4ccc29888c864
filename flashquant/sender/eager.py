"""Places at which tensors differ, and the gaps between them: the definition, on any device.

`places.c` is its equal for host memory (native.py). Tensors are contiguous; elements are compared
and copied by their bits.
"""

from __future__ import annotations

import ctypes
from collections.abc import Mapping
from typing import Final, NamedTuple

import torch
from torch import Tensor

from flashquant.schemes import Region

LIMITS: Final[Mapping[torch.dtype, int]] = {
    torch.uint8: (1 << 8) - 1,
    torch.uint16: (1 << 16) - 1,
    torch.uint32: (1 << 32) - 1,
}
"""Of gaps: the largest number, which stands for as many unchanged elements and no change."""

_WORD: Final = 8  # bytes


_BITS: Final[Mapping[int, torch.dtype]] = {1: torch.uint8, 2: torch.int16, 4: torch.int32}


class Found(NamedTuple):
    """What differs between two tensors.

    Attributes:
        here: the places, ascending.
        values: the new elements there.
        sizes: how many numbers the gaps between them take, by the widths of `LIMITS`.

    """

    here: Tensor
    values: Tensor
    sizes: list[int]


def flat_bits(tensor: Tensor) -> Tensor:
    """The elements as integers, `[numel]`, in the tensor's own memory."""
    bits = tensor.detach().view(_BITS[tensor.element_size()])
    return bits.as_strided((bits.numel(),), (1,))  # a single element may have any stride


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


def compared(old: Tensor, new: Tensor, region: Region | None) -> Found:
    """What differs between two tensors.

    Args:
        region: the new one, with the sums of the old one's blocks: they follow.

    """
    here = differing(old, new)
    if region is not None and len(here):
        at = _words_of(here * new.element_size())
        region.shift(at, region._replace(memory=old).words(at), region.words(at))
    return Found(here, picked(new, here), sizes(here))


def packed(here: Tensor, width: torch.dtype, size: int) -> Tensor:
    """The gaps between these places: so many numbers of so many bits."""
    gaps, limit = _gaps(here), LIMITS[width]
    where = torch.arange(len(gaps), device=gaps.device) + (gaps // limit).cumsum(0)
    stored = torch.full((size,), limit, dtype=torch.int64, device=gaps.device)
    stored[where] = gaps % limit
    return stored.to(width)


def bitmap(here: Tensor, numel: int) -> Tensor:
    """One bit an element, the first in the lowest bit of the first byte."""
    bits = torch.zeros(-(-numel // 8) * 8, dtype=torch.uint8, device=here.device)
    bits[here] = 1
    return (bits.view(-1, 8) << torch.arange(8, device=here.device)).sum(1).to(torch.uint8)


def unpacked(form: str, places: Tensor) -> Tensor:
    """The places that gaps, or a bitmap, stand for: ascending, int64."""
    if form == "bitmap":
        bits = (places[:, None] >> torch.arange(8, dtype=torch.uint8, device=places.device)) & 1
        return bits.flatten().nonzero().flatten()
    wide = places.to(torch.int64)
    skips = wide == LIMITS[places.dtype]
    here: Tensor = torch.where(skips, wide, wide + 1).cumsum(0) - 1
    return here[~skips]


def span(form: str, places: Tensor) -> tuple[int, int]:
    """How many places they stand for, and the last of them; -1 where there is none."""
    here = unpacked(form, places)
    return len(here), int(here[-1]) if len(here) else -1


def picked(values: Tensor, here: Tensor) -> Tensor:
    """The elements at these places, flat."""
    return flat_bits(values)[here].view(values.dtype)


def scattered(live: Tensor, form: str, places: Tensor, values: Tensor) -> None:
    """Overwrite the elements there."""
    _put(live, unpacked(form, places), values)


def exchanged(
    live: Tensor,
    form: str,
    places: Tensor,
    values: Tensor,
    old: Tensor,
    done: ctypes.c_int64,
) -> None:
    """Overwrite the elements there.

    Args:
        old: takes what they were, before.
        done: 1 from when that is so, and any of them may have been overwritten.

    """
    here = unpacked(form, places).to(live.device)
    flat_bits(old).copy_(flat_bits(picked(live, here)))
    done.value = 1
    _put(live, here, values)


def _words_of(starts: Tensor) -> Tensor:
    """The words that bytes lie in, each once."""
    words: Tensor = torch.unique_consecutive(starts // _WORD)  # they ascend
    return words


def _put(live: Tensor, here: Tensor, values: Tensor) -> None:
    flat_bits(live)[here.to(live.device)] = flat_bits(values).to(live.device)


def _gaps(here: Tensor) -> Tensor:
    return torch.diff(here, prepend=here.new_tensor([-1])) - 1
