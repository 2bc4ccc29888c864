"""What is different between two tensors, exactly, in as few bytes as there is a simple way to.

    gaps     for each changed element, how many unchanged ones lie between it and the last, in
             8, 16 or 32 bits; all bits set stand for that many unchanged ones and no change
    bitmap   one bit an element, the first in the lowest bit of the first byte
    whole    the new tensor, where that is no larger

Elements are compared, and copied, by their bits: a zero with a sign is another one than without.
"""

from __future__ import annotations

import ctypes
import functools
from collections.abc import Callable
from typing import Literal, NamedTuple

import torch
from torch import Tensor

from flashquant.sender import eager, native
from flashquant.sender.eager import LIMITS

Form = Literal["gaps", "bitmap", "whole"]


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
    kernels = native.kernels(old, new)
    here = kernels.differing(old, new)
    if not len(here):
        return None
    sizes = dict(zip(LIMITS, kernels.sizes(here), strict=True))
    width = min(sizes, key=lambda width: sizes[width] * width.itemsize)
    gaps, bitmap = sizes[width] * width.itemsize, -(-new.numel() // 8)
    if len(here) * new.element_size() + min(gaps, bitmap) >= new.nbytes:
        return Change("whole", None, new)
    values = kernels.picked(new, here)
    if bitmap < gaps:
        return Change("bitmap", _bitmap(here, new.numel()), values)
    return Change("gaps", kernels.packed(here, width, sizes[width]), values)


def check(found: Change, numel: int) -> None:
    """Raise ValueError unless its places are those of a tensor of so many elements, and as many as
    its values."""
    if found.places is None or found.places.dim() != 1:
        raise ValueError("it says no places")
    if found.form == "gaps" and found.places.dtype not in LIMITS:
        raise ValueError(f"its gaps are {found.places.dtype}")
    if found.form == "gaps":
        count, last = native.kernels(found.places, found.places).span(found.places)
    else:
        here = _of_bitmap(found.places, numel)
        count, last = len(here), int(here[-1]) if len(here) else -1
    if last >= numel:
        raise ValueError(f"it changes element {last} of {numel}")
    if count != found.values.numel():
        raise ValueError(f"it has {count} places and {found.values.numel()} values")


def apply(found: Change, base: Tensor) -> Tensor:
    """The new tensor, made in the memory of the old one (contiguous) unless it came whole."""
    if found.form == "whole":
        return found.values
    write(found, base)
    return base


Remember = Callable[[Callable[[], object], int], object]


def write(found: Change, live: Tensor, remember: Remember | None = None) -> None:
    """Make the new tensor in the memory of the old one, also if it came whole.

    Args:
        found: what changed.
        live: the old tensor, contiguous.
        remember: takes, before anything is written, what puts the old elements back, and how many
            bytes that holds.

    Raises:
        ValueError: as `check`; nothing is written.

    """
    if found.form == "whole" or found.places is None:
        if remember is not None:
            old = live.clone()
            remember(functools.partial(live.copy_, old), old.nbytes)
        live.copy_(found.values.view(live.shape))
        return
    check(found, live.numel())
    if found.form == "gaps":
        _write_at_gaps(found.places, found.values, live, remember)
        return
    places = _of_bitmap(found.places, live.numel()).to(live.device)
    if remember is not None:
        old, bitmap = eager.picked(live, places), found.places
        remember(lambda: _put_at_bits(live, bitmap, old), old.nbytes + bitmap.nbytes)
    eager.put(live, places, found.values)


def _put_at_bits(live: Tensor, bitmap: Tensor, values: Tensor) -> None:
    """Places take 8 bytes each: they are found again where they are needed again."""
    eager.put(live, _of_bitmap(bitmap, live.numel()), values)


def _write_at_gaps(gaps: Tensor, values: Tensor, live: Tensor, remember: Remember | None) -> None:
    """`write` at places that were looked at; the old elements are read in the same pass."""
    kernels = native.kernels(live, gaps)
    if remember is None:
        kernels.scattered(live, gaps, values)
        return
    old, done = torch.empty_like(values, device=live.device), ctypes.c_int64()

    def back() -> None:
        if done.value:  # an interrupt may come between the promise and the exchange
            kernels.scattered(live, gaps, old)

    remember(back, old.nbytes + gaps.nbytes)
    kernels.exchanged(live, gaps, values, old, done)


def _bitmap(here: Tensor, numel: int) -> Tensor:
    bits = torch.zeros(-(-numel // 8) * 8, dtype=torch.uint8, device=here.device)
    bits[here.to(torch.int64) & 0xFFFFFFFF if here.dtype == torch.int32 else here] = 1
    return (bits.view(-1, 8) << torch.arange(8, device=here.device)).sum(1).to(torch.uint8)


def _of_bitmap(stored: Tensor, numel: int) -> Tensor:
    if stored.dtype != torch.uint8 or len(stored) != -(-numel // 8):
        raise ValueError(f"its bitmap is {stored.dtype} {tuple(stored.shape)}")
    bits = (stored[:, None] >> torch.arange(8, dtype=torch.uint8, device=stored.device)) & 1
    return bits.flatten().nonzero().flatten()
