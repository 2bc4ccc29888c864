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

from flashquant.schemes import Region
from flashquant.sender import native
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


def change(old: Tensor | None, new: Tensor, region: Region | None = None) -> Change | None:
    """What makes `new` of `old`; None where they are equal, all of it where there is no old one.

    Args:
        old: of the same shape and dtype.
        new: contiguous.
        region: the new one, with the sums of the old one's blocks: they follow.

    """
    if old is None:
        return Change("whole", None, new)
    kernels = native.kernels(old, new)
    here, values, found = kernels.compared(old, new, region)
    if not len(here):
        return None
    sizes = dict(zip(LIMITS, found, strict=True))
    width = min(sizes, key=lambda width: sizes[width] * width.itemsize)
    gaps, bitmap = sizes[width] * width.itemsize, -(-new.numel() // 8)
    if len(here) * new.element_size() + min(gaps, bitmap) >= new.nbytes:
        return Change("whole", None, new)
    if bitmap < gaps:
        return Change("bitmap", kernels.bitmap(here, new.numel()), values.clone())
    return Change("gaps", kernels.packed(here, width, sizes[width]), values.clone())


def check(found: Change, numel: int) -> None:
    """Raise ValueError unless its places are those of a tensor of so many elements, and as many as
    its values."""
    form, places, values = found
    if places is None or places.dim() != 1:
        raise ValueError("it says no places")
    if form == "gaps" and places.dtype not in LIMITS:
        raise ValueError(f"its gaps are {places.dtype}")
    if form == "bitmap" and (places.dtype, len(places)) != (torch.uint8, -(-numel // 8)):
        raise ValueError(f"its bitmap is {places.dtype} {tuple(places.shape)}")
    if places.numel() > numel:  # so that no sum of gaps leaves 64 bits
        raise ValueError(f"it says {places.numel()} places of {numel} elements")
    count, last = native.kernels(places, places).span(form, places)
    if last >= numel:
        raise ValueError(f"it changes element {last} of {numel}")
    if count != values.numel():
        raise ValueError(f"it has {count} places and {values.numel()} values")


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
    form, places, values = found
    if form == "whole" or places is None:
        if remember is not None:
            before = live.clone()
            remember(functools.partial(live.copy_, before), before.nbytes)
        live.copy_(values.view(live.shape))
        return
    check(found, live.numel())
    places = places.contiguous()
    kernels = native.kernels(live, places)
    if remember is None:
        kernels.scattered(live, form, places, values)
        return
    old, done = torch.empty_like(values, device=live.device), ctypes.c_int64()

    def back() -> None:
        if done.value:  # an interrupt may come between the promise and the exchange
            kernels.scattered(live, form, places, old)

    remember(back, old.nbytes)  # the places are the bundle's own memory
    kernels.exchanged(live, form, places, values, old, done)
