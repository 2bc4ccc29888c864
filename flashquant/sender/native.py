"""The equals in C of what `eager` defines, for host memory: `places.c`.

Built by the machine's own compiler and believed after they have returned the bits of the
definition, as the kernels of `flashquant.schemes` are. `FLASHQUANT_NATIVE=0` does without.
"""

from __future__ import annotations

import ctypes
import functools
import logging
import os
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any, Final

import torch
from torch import Tensor

from flashquant.config import env
from flashquant.schemes import BuildError, Region, built, sum_keys
from flashquant.scratch import Scratch
from flashquant.sender import eager
from flashquant.sender.eager import Found

logger = logging.getLogger(__name__)

_HERE: Final = Path(__file__).parent
_SOURCES: Final = (_HERE / "places.c", _HERE.parent / "schemes/fingerprints/words.h")
_POINTER, _SIZE = ctypes.c_void_p, ctypes.c_int64
_SIGNATURES: Final[dict[str, list[Any]]] = {
    "differing": [_POINTER, _POINTER, _SIZE, *[_POINTER] * 5],
    "packed": [_POINTER, _SIZE, _POINTER],
    "span": [_POINTER, _SIZE, _POINTER],
    "scattered": [_POINTER, _POINTER, _SIZE, _POINTER],
    "exchanged": [_POINTER, _POINTER, _SIZE, *[_POINTER] * 3],
}
_BITS: Final = (8, 16, 32)  # of an element
_WIDTHS: Final = (1, *_BITS)  # of what says a place: a bitmap, or a gap
_SUFFIXES: Final[dict[str, tuple[str, ...]]] = {
    "differing": tuple(f"_{bits}" for bits in _BITS),
    **dict.fromkeys(("packed", "span"), tuple(f"_{width}" for width in _WIDTHS)),
    **dict.fromkeys(
        ("scattered", "exchanged"), tuple(f"_{w}_{bits}" for w in _WIDTHS for bits in _BITS)
    ),
}
_LINE: Final = 64  # bytes that are stored at once
_MOST: Final = (1 << 32) - 1  # places are counted in 32 bits


_EQUAL: Final = Found(*(torch.empty(0, device="cpu"),) * 2, [0, 0, 0])


class Kernels:
    """What `eager` defines, in C. Places are int32 here, and read as if they had no sign."""

    def __init__(self, library: ctypes.CDLL) -> None:
        """Raises AttributeError where a kernel is missing."""
        self._calls: dict[str, Any] = {}
        self._rooms = _Rooms()
        self._kept = sum_keys(torch.device("cpu"))
        self._keys = self._kept.data_ptr()
        for name, suffixes in _SUFFIXES.items():
            for suffix in suffixes:
                call = self._calls[name + suffix] = getattr(library, name + suffix)
                call.argtypes, call.restype = _SIGNATURES[name], None

    def compared(self, old: Tensor, new: Tensor, region: Region | None) -> Found:
        """Its places are good until the next call."""
        numel, size = new.numel(), new.element_size()
        here = self._rooms.places.room(numel * 4 + _LINE, new.device)
        values = self._rooms.values.room(numel * size + _LINE, new.device)
        result = (ctypes.c_int64 * 4)()
        self._calls[f"differing_{_bits(new)}"](
            old.data_ptr(),
            new.data_ptr(),
            numel,
            self._keys,
            None if region is None else region.blocks.data_ptr(),
            here.data_ptr(),
            values.data_ptr(),
            result,
        )
        count, *sizes = result
        if not count:
            return _EQUAL
        found = values[: count * size].view(new.dtype)
        return Found(here[: count * 4].view(torch.int32), found, sizes)

    def packed(self, here: Tensor, width: torch.dtype, size: int) -> Tensor:
        gaps = torch.empty(size, dtype=width, device="cpu")
        self._calls[f"packed_{_bits(gaps)}"](here.data_ptr(), here.numel(), gaps.data_ptr())
        return gaps

    def bitmap(self, here: Tensor, numel: int) -> Tensor:
        bits = torch.zeros(-(-numel // 8), dtype=torch.uint8, device="cpu")
        self._calls["packed_1"](here.data_ptr(), here.numel(), bits.data_ptr())
        return bits

    def span(self, form: str, places: Tensor) -> tuple[int, int]:
        found = (ctypes.c_int64 * 2)()
        call = self._calls[f"span_{_width(form, places)}"]
        call(places.data_ptr(), places.numel(), found)
        return found[0], found[1]

    def scattered(self, live: Tensor, form: str, places: Tensor, values: Tensor) -> None:
        call = self._calls[f"scattered_{_width(form, places)}_{_bits(live)}"]
        call(live.data_ptr(), places.data_ptr(), places.numel(), values.data_ptr())

    def exchanged(
        self,
        live: Tensor,
        form: str,
        places: Tensor,
        values: Tensor,
        old: Tensor,
        done: ctypes.c_int64,
    ) -> None:
        self._calls[f"exchanged_{_width(form, places)}_{_bits(live)}"](
            live.data_ptr(),
            places.data_ptr(),
            places.numel(),
            values.data_ptr(),
            old.data_ptr(),
            ctypes.byref(done),
        )


class _Rooms(threading.local):
    """Where one thread's comparisons put what they find."""

    def __init__(self) -> None:
        self.places, self.values = Scratch(), Scratch()


def kernels(tensor: Tensor, other: Tensor) -> Any:
    """What takes these two: the kernels of this machine, or else the definition."""
    here = tensor.is_cpu and other.is_cpu and tensor.numel() < _MOST
    return (_believed() if here else None) or eager


@functools.cache
def _believed() -> Kernels | None:
    """The kernels of this machine, built and believed; None where there are none."""
    if not env.NATIVE.read(os.environ):
        return None
    try:
        found = Kernels(ctypes.CDLL(str(built(_SOURCES))))
    except (BuildError, OSError, AttributeError) as reason:
        logger.info("what changed is found by torch, several times slower than in C: %s", reason)
        return None
    if (strange := difference(found)) is None:
        return found
    logger.error(
        "%s, built by this machine's C compiler, differs from its definition, so torch finds what "
        "changed instead. Please report the compiler and the CPU.",
        strange,
    )
    return None


def difference(found: Kernels) -> str | None:
    """The first kernel that returns other bits than its definition, by name."""
    for old, new in _hard_pairs():
        region, right = (Region(new, Region.of(old).blocks) for _ in range(2))
        here, values, sizes = found.compared(old, new, region)
        wanted = eager.compared(old, new, right)
        same = torch.equal(values, wanted.values) and torch.equal(region.blocks, right.blocks)
        if not (same and here.tolist() == wanted.here.tolist() and sizes == wanted.sizes):
            return "differing"
        places: dict[str, list[Tensor]] = {"bitmap": [eager.bitmap(wanted.here, new.numel())]}
        if not torch.equal(found.bitmap(here, new.numel()), places["bitmap"][0]):
            return "packed"
        places["gaps"] = [
            eager.packed(wanted.here, width, size)
            for width, size in zip(eager.LIMITS, sizes, strict=True)
        ]
        for gaps in places["gaps"]:
            if found.packed(here, gaps.dtype, len(gaps)).tolist() != gaps.tolist():
                return "packed"
        for form, many in places.items():
            for one in many:
                if strange := _of_writing(found, old, new, form, one, wanted.values.clone()):
                    return strange
    return None


def _of_writing(
    found: Kernels, old: Tensor, new: Tensor, form: str, places: Tensor, values: Tensor
) -> str | None:
    """`difference`, of the kernels that take places."""
    if found.span(form, places) != eager.span(form, places):
        return "span"
    found.scattered(made := old.clone(), form, places, values)
    if not torch.equal(made, new):
        return "scattered"
    made, taken, done = old.clone(), torch.empty_like(values), ctypes.c_int64()
    found.exchanged(made, form, places, values, taken, done)
    right = torch.equal(made, new) and torch.equal(taken, old[old != new])
    return None if right and done.value else "exchanged"


def _hard_pairs() -> Iterator[tuple[Tensor, Tensor]]:
    """Gaps around every limit, changes side by side and far apart, and none at all."""
    limits = [gap for limit in (255, 65535) for gap in range(limit - 1, limit + 2)]
    ends = torch.tensor([0, 1, 2, *limits, 2 * 255, 2 * 65535, 7, 7], device="cpu") + 1
    for dtype in (torch.uint8, torch.int16, torch.int32):
        old = torch.arange(330_003, device="cpu").to(dtype)
        for here in (ends.cumsum(0) - 1, torch.arange(3, 200, device="cpu"), ends[:0]):
            new = old.clone()
            new[here] ^= 1
            yield old, new


def _bits(tensor: Tensor) -> int:
    return 8 * tensor.element_size()


def _width(form: str, places: Tensor) -> int:
    return 1 if form == "bitmap" else _bits(places)
