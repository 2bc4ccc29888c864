"""The equals in C of what `eager` defines, for host memory: `places.c`.

Built by the machine's own compiler and believed after they have returned the bits of the
definition, as the kernels of `flashquant.schemes` are. `FLASHQUANT_NATIVE=0` does without.
"""

from __future__ import annotations

import ctypes
import functools
import logging
import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any, Final

import torch
from torch import Tensor

from flashquant.config import env
from flashquant.schemes import BuildError, built
from flashquant.sender import eager

logger = logging.getLogger(__name__)

_SOURCES: Final = (Path(__file__).parent / "places.c",)
_POINTER, _SIZE = ctypes.c_void_p, ctypes.c_int64
_SIGNATURES: Final[dict[str, list[Any]]] = {
    "differing": [_POINTER, _POINTER, _SIZE, _POINTER],
    "picked": [_POINTER, _POINTER, _SIZE, _POINTER],
    "sizes": [_POINTER, _SIZE, _POINTER],
    "packed": [_POINTER, _SIZE, _POINTER],
    "span": [_POINTER, _SIZE, _POINTER],
    "gathered": [_POINTER, _POINTER, _SIZE, _POINTER],
    "scattered": [_POINTER, _POINTER, _SIZE, _POINTER],
    "exchanged": [_POINTER, _POINTER, _SIZE, _POINTER, _POINTER, _POINTER],
}
_BITS: Final = (8, 16, 32)
_SUFFIXES: Final[dict[str, tuple[str, ...]]] = {
    "sizes": ("",),
    **dict.fromkeys(("differing", "picked", "packed", "span"), tuple(f"_{b}" for b in _BITS)),
    **dict.fromkeys(
        ("gathered", "scattered", "exchanged"), tuple(f"_{g}_{b}" for g in _BITS for b in _BITS)
    ),
}
_MOST: Final = (1 << 32) - 1  # places are counted in 32 bits


class Kernels:
    """What `eager` defines, in C. Places are int32 here, and read as if they had no sign."""

    def __init__(self, library: ctypes.CDLL) -> None:
        """Raises AttributeError where a kernel is missing."""
        self._calls: dict[str, Any] = {}
        for name, suffixes in _SUFFIXES.items():
            for suffix in suffixes:
                call = self._calls[name + suffix] = getattr(library, name + suffix)
                call.argtypes = _SIGNATURES[name]
                call.restype = _SIZE if name == "differing" else None

    def differing(self, old: Tensor, new: Tensor) -> Tensor:
        here = torch.empty(new.numel(), dtype=torch.int32, device="cpu")  # touched as far as used
        call = self._calls[f"differing_{_bits(new)}"]
        count = call(old.data_ptr(), new.data_ptr(), new.numel(), here.data_ptr())
        return here[:count]

    def sizes(self, here: Tensor) -> list[int]:
        found = (ctypes.c_int64 * len(_BITS))()
        self._calls["sizes"](here.data_ptr(), here.numel(), found)
        return list(found)

    def packed(self, here: Tensor, width: torch.dtype, size: int) -> Tensor:
        gaps = torch.empty(size, dtype=width, device="cpu")
        self._calls[f"packed_{_bits(gaps)}"](here.data_ptr(), here.numel(), gaps.data_ptr())
        return gaps

    def span(self, gaps: Tensor) -> tuple[int, int]:
        found = (ctypes.c_int64 * 2)()
        self._calls[f"span_{_bits(gaps)}"](gaps.data_ptr(), gaps.numel(), found)
        return found[0], found[1]

    def picked(self, values: Tensor, here: Tensor) -> Tensor:
        found = values.new_empty(here.numel())
        call = self._calls[f"picked_{_bits(values)}"]
        call(values.data_ptr(), here.data_ptr(), here.numel(), found.data_ptr())
        return found

    def gathered(self, values: Tensor, gaps: Tensor, count: int) -> Tensor:
        found = values.new_empty(count)
        call = self._calls[f"gathered_{_bits(gaps)}_{_bits(values)}"]
        call(values.data_ptr(), gaps.data_ptr(), gaps.numel(), found.data_ptr())
        return found

    def scattered(self, live: Tensor, gaps: Tensor, values: Tensor) -> None:
        call = self._calls[f"scattered_{_bits(gaps)}_{_bits(live)}"]
        call(live.data_ptr(), gaps.data_ptr(), gaps.numel(), values.data_ptr())

    def exchanged(
        self, live: Tensor, gaps: Tensor, values: Tensor, old: Tensor, done: ctypes.c_int64
    ) -> None:
        call = self._calls[f"exchanged_{_bits(gaps)}_{_bits(live)}"]
        places = live.data_ptr(), gaps.data_ptr(), gaps.numel()
        call(*places, values.data_ptr(), old.data_ptr(), ctypes.byref(done))


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
        here = found.differing(old, new)
        places = eager.differing(old, new)
        if here.tolist() != places.tolist():
            return "differing"
        sizes = eager.sizes(places)
        if found.sizes(here) != sizes:
            return "sizes"
        values = eager.picked(new, places)
        if not torch.equal(found.picked(new, here), values):
            return "picked"
        for width, size in zip(eager.LIMITS, sizes, strict=True):
            gaps = eager.packed(places, width, size)
            if found.packed(here, width, size).tolist() != gaps.tolist():
                return "packed"
            if found.span(gaps) != eager.span(gaps):
                return "span"
            if not torch.equal(found.gathered(new, gaps, len(values)), values):
                return "gathered"
            found.scattered(made := old.clone(), gaps, values)
            if not torch.equal(made, new):
                return "scattered"
            taken, done = torch.empty_like(values), ctypes.c_int64()
            found.exchanged(made := old.clone(), gaps, values, taken, done)
            right = torch.equal(made, new) and torch.equal(taken, eager.picked(old, places))
            if not (right and done.value):
                return "exchanged"
    return None


def _hard_pairs() -> Iterator[tuple[Tensor, Tensor]]:
    """Gaps around every limit, changes side by side and far apart, and none at all."""
    limits = [gap for limit in (255, 65535) for gap in range(limit - 1, limit + 2)]
    ends = torch.tensor([0, 1, 2, *limits, *(2 * gap for gap in limits), 7, 7], device="cpu") + 1
    for dtype in (torch.uint8, torch.int16, torch.int32):
        old = torch.arange(900_003, device="cpu").to(dtype)
        for here in (ends.cumsum(0) - 1, torch.arange(3, 200, device="cpu"), ends[:0]):
            new = old.clone()
            new[here] ^= 1
            yield old, new


def _bits(tensor: Tensor) -> int:
    return 8 * tensor.element_size()
