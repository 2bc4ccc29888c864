"""What is different between two tensors, exactly, in as few bytes as there is a simple way to.

    gaps     for each changed element, how many unchanged ones lie between it and the last, in
             8, 16 or 32 bits; all bits set stand for that many unchanged ones and no change
    bitmap   one bit an element, the first in the lowest bit of the first byte
    whole    the new tensor, where that is no larger

Elements are compared, and copied, by their bits: a zero with a sign is another one than without.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Mapping
from typing import Final, Literal, NamedTuple

import torch
from torch import Tensor

Form = Literal["gaps", "bitmap", "whole"]

_WIDTHS: Final[Mapping[torch.dtype, int]] = {
    torch.uint8: (1 << 8) - 1,
    torch.uint16: (1 << 16) - 1,
    torch.uint32: (1 << 32) - 1,
}
"""Of gaps: the largest number, which stands for as many unchanged elements and no change."""

_WORD: Final = 8  # bytes
_BITS: Final[Mapping[int, torch.dtype]] = {1: torch.uint8, 2: torch.int16, 4: torch.int32}


class Change(NamedTuple):
    """The difference of one tensor from the last.

    Attributes:
        form: how `places` says which elements changed.
        places: gaps `[n]` or a bitmap `[ceil(numel / 8)]`; None of a whole tensor.
        values: of the elements that changed, in order; or the whole new tensor.

    """

    form: Form
    places: Tensor | None
    values: Tensor


def change(old: Tensor | None, new: Tensor) -> Change | None:
    """What makes `new` of `old`; None where they are equal, all of it where there is no old one.

    Args:
        old: of the same shape and dtype.
        new: contiguous.

    """
    if old is None:
        return Change("whole", None, new)
    here = _different(_flat_bits(old), _flat_bits(new))
    if not len(here):
        return None
    values = new.flatten()[here]
    gaps = torch.diff(here, prepend=here.new_tensor([-1])) - 1
    sizes = {
        width: (len(gaps) + int((gaps // limit).sum())) * width.itemsize
        for width, limit in _WIDTHS.items()
    }
    width = min(sizes, key=sizes.__getitem__)
    bitmap = -(-new.numel() // 8)
    if values.nbytes + min(sizes[width], bitmap) >= new.nbytes:
        return Change("whole", None, new)
    if bitmap < sizes[width]:
        return Change("bitmap", _bitmap(here, new.numel()), values)
    return Change("gaps", _packed(gaps, width), values)


def places(found: Change, numel: int) -> Tensor:
    """The positions that changed, ascending, int64 `[n]`.

    Raises:
        ValueError: they are not those of a tensor of so many elements, or not as many as values.

    """
    if found.places is None or found.places.dim() != 1:
        raise ValueError("it says no places")
    here = _of_bitmap(found.places, numel) if found.form == "bitmap" else _unpacked(found.places)
    if len(here) and int(here[-1]) >= numel:
        raise ValueError(f"it changes element {int(here[-1])} of {numel}")
    if len(here) != found.values.numel():
        raise ValueError(f"it has {len(here)} places and {found.values.numel()} values")
    return here


def apply(found: Change, base: Tensor) -> Tensor:
    """The new tensor, made in the memory of the old one (contiguous) unless it came whole."""
    if found.form == "whole":
        return found.values
    here = places(found, base.numel()).to(base.device)
    _flat_bits(base)[here] = _flat_bits(found.values).to(base.device)
    return base


Remember = Callable[[Callable[[], object], int], object]


def write(found: Change, live: Tensor, remember: Remember) -> None:
    """Make the new tensor in the memory of the old one, also if it came whole.

    Args:
        found: what changed.
        live: the old tensor, contiguous.
        remember: takes, before anything is written, what puts the old elements back, and how many
            bytes that holds.

    """
    if found.form == "whole":
        old = live.clone()
        remember(functools.partial(live.copy_, old), old.nbytes)
        live.copy_(found.values.view(live.shape))
        return
    flat, here = _flat_bits(live), places(found, live.numel()).to(live.device)
    old = flat[here]
    remember(functools.partial(flat.index_copy_, 0, here, old), old.nbytes + here.nbytes)
    flat[here] = _flat_bits(found.values).to(live.device)


def _different(old: Tensor, new: Tensor) -> Tensor:
    """Where two flat tensors differ; eight bytes at a time first, since most are equal."""
    many = _WORD // new.element_size()
    if any(tensor.storage_offset() % many for tensor in (old, new)):
        return (old != new).nonzero().flatten()
    whole = new.numel() // many * many
    words = old[:whole].view(torch.int64) != new[:whole].view(torch.int64)
    near = words.nonzero() * many + torch.arange(many, device=new.device)
    here = torch.cat([near.flatten(), torch.arange(whole, new.numel(), device=new.device)])
    return here[old[here] != new[here]]


def _flat_bits(tensor: Tensor) -> Tensor:
    """The elements as integers, `[numel]`; of a contiguous tensor, in its own memory."""
    return tensor.detach().contiguous().view(_BITS[tensor.element_size()]).view(-1)


def _packed(gaps: Tensor, width: torch.dtype) -> Tensor:
    limit = _WIDTHS[width]
    skips = gaps // limit
    where = torch.arange(len(gaps), device=gaps.device) + skips.cumsum(0)
    stored = torch.full((int(where[-1]) + 1,), limit, dtype=torch.int64, device=gaps.device)
    stored[where] = gaps % limit
    return stored.to(width)


def _unpacked(stored: Tensor) -> Tensor:
    if stored.dtype not in _WIDTHS:
        raise ValueError(f"its gaps are {stored.dtype}")
    gaps, limit = stored.to(torch.int64), _WIDTHS[stored.dtype]
    skips = gaps == limit
    here: Tensor = torch.where(skips, gaps, gaps + 1).cumsum(0) - 1
    return here[~skips]


def _bitmap(here: Tensor, numel: int) -> Tensor:
    bits = torch.zeros(-(-numel // 8) * 8, dtype=torch.uint8, device=here.device)
    bits[here] = 1
    return (bits.view(-1, 8) << torch.arange(8, device=here.device)).sum(1).to(torch.uint8)


def _of_bitmap(stored: Tensor, numel: int) -> Tensor:
    if stored.dtype != torch.uint8 or len(stored) != -(-numel // 8):
        raise ValueError(f"its bitmap is {stored.dtype} {tuple(stored.shape)}")
    bits = (stored[:, None] >> torch.arange(8, dtype=torch.uint8, device=stored.device)) & 1
    return bits.flatten().nonzero().flatten()
