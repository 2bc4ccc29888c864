"""How pushed weights move through their codes: told by every report, cheap enough to leave on.

An update of reinforcement learning is small, and a code is coarse: how many codes change at
all says whether the rollouts see it. About 1,024 codes of each weight are kept and compared,
always the same, over all rows and columns: the fraction is right to 1.6 % or better, of a hundred
weights to 0.2 %. What the kernels hold could not be asked: packed memory shows no codes.

How far a weight has outgrown frozen scales is counted exactly, while it is quantized.
"""

from __future__ import annotations

import functools
import logging
import math
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from itertools import accumulate, pairwise
from typing import Final, NamedTuple

import numpy as np
import torch
from torch import Tensor

from flashquant.report import Drift
from flashquant.schemes.stored import holds_codes

logger = logging.getLogger(__name__)

_SAMPLE: Final = 1024


class Clipping(NamedTuple):
    """How well frozen scales hold one weight, as scalars on its device.

    Attributes:
        outside: how many of its elements were clipped by a code or more.
        peak: max |w| / (127 * scale); about 1 where they fit.

    """

    outside: Tensor
    peak: Tensor


@dataclass(frozen=True)
class Noted:
    """What an update under way brings of one weight; nothing of it counts until it stands.

    Attributes:
        sample: of its codes, int8: a copy, or a view of live memory, which holds them then.

    """

    size: int
    sample: Tensor
    clipping: Clipping | None


class Standing(NamedTuple):
    """A sample that stands, with those of other weights in one tensor."""

    samples: Tensor
    start: int
    stop: int


class Drifts:
    """The codes that stand, by sample, and who is told when scales no longer hold.

    Args:
        warn_above: the fraction of a weight that may be clipped before somebody is told.

    """

    def __init__(self, warn_above: float = 1.0) -> None:
        self._standing: dict[str, Standing] = {}
        self._warn_above = warn_above

    def start(self, name: str, values: Tensor) -> None:
        """The engine starts on these codes; other dtypes are passed over."""
        if holds_codes(values.dtype):
            sample = _sampled(values).clone()
            self._standing[name] = Standing(sample, 0, len(sample))

    def note(self, name: str, values: Tensor, clipping: Clipping | None) -> Noted | None:
        """What a push makes of one weight; None for what is no codes. Waits for no device."""
        if not holds_codes(values.dtype):
            return None
        return Noted(values.numel(), _sampled(values).clone(), clipping)

    def settle(self, noted: Mapping[str, Noted]) -> dict[str, Drift]:
        """An update stands: what it brought is what the next one is compared with."""
        changed: dict[str, float] = {}
        for names in _by_device(noted):
            now = _together(names, [noted[name].sample for name in names])
            changed |= self._changed(now)
            self._standing |= now
        numbers = _on_host(
            [n.clipping and n.clipping.outside for n in noted.values()]
            + [n.clipping and n.clipping.peak for n in noted.values()]
        )
        count = len(noted)
        drifts = {
            name: Drift(
                size=note.size,
                changed=changed.get(name),
                clipped=None if (out := numbers[i]) is None else out / note.size,
                peak=numbers[count + i],
            )
            for i, (name, note) in enumerate(noted.items())
        }
        self._warn(drifts)
        return drifts

    def _changed(self, now: Mapping[str, Standing]) -> dict[str, float]:
        """The fraction of each sample that is other than before, of all of them at once."""
        pairs = {
            name: (new, old)
            for name, new in now.items()
            if (old := self._standing.get(name)) is not None
            and old.stop - old.start == new.stop - new.start > 0
            and old.samples.device == new.samples.device
        }
        if not pairs:
            return {}
        fresh, known = (_joined(samples) for samples in zip(*pairs.values(), strict=True))
        sizes = np.array([new.stop - new.start for new, _ in pairs.values()])
        others = fresh.ne(known).cpu().view(torch.uint8).numpy()
        counts = np.add.reduceat(others, sizes.cumsum() - sizes, dtype=np.int64)
        return dict(zip(pairs, (counts / sizes).tolist(), strict=True))

    def _warn(self, drifts: Mapping[str, Drift]) -> None:
        """Say once that the scales no longer hold what is pushed."""
        over = {
            name: drift for name, drift in drifts.items() if (drift.clipped or 0) > self._warn_above
        }
        if not over:
            return
        self._warn_above = math.inf
        worst = max(over, key=lambda name: over[name].clipped or 0)
        logger.warning(
            "%.2f %% of %s has outgrown the frozen scales of its checkpoint (up to %.2f times) "
            "and is clipped, and %d more weights likewise. Write `scales: refreshed`, or make a "
            "new profile. Later reports tell of every layer; this is not said again.",
            100 * (over[worst].clipped or 0),
            worst,
            over[worst].peak,
            len(over) - 1,
        )


def noted_in_place(codes: Tensor) -> Noted:
    """What every update notes that makes these codes where they lie, and then looks at them."""
    return Noted(codes.numel(), _sampled(codes), None)


def _sampled(codes: Tensor) -> Tensor:
    """Codes at the same places every time; all of them where they are few."""
    codes = codes.contiguous().view(torch.int8)
    stride = _stride(codes.numel(), codes.shape[-1])
    places = (-(-codes.numel() // stride),), (stride,)
    return codes.as_strided(*places, codes.storage_offset())


def _by_device(noted: Mapping[str, Noted]) -> Iterable[list[str]]:
    """Names, those together whose samples are on one device."""
    names: dict[torch.device, list[str]] = {}
    for name, note in noted.items():
        names.setdefault(note.sample.device, []).append(name)
    return names.values()


def _together(names: Iterable[str], samples: list[Tensor]) -> dict[str, Standing]:
    """Samples, copied into one tensor one after another."""
    together = torch.cat(samples)
    ends = list(accumulate(map(len, samples), initial=0))
    return {
        name: Standing(together, *place) for name, place in zip(names, pairwise(ends), strict=True)
    }


def _joined(samples: Iterable[Standing]) -> Tensor:
    """Samples one after another; neighbours, which stand so already, are not taken apart."""
    runs: list[Standing] = []
    for one in samples:
        if runs and runs[-1].samples is one.samples and runs[-1].stop == one.start:
            runs[-1] = Standing(one.samples, runs[-1].start, one.stop)
        else:
            runs.append(one)
    return torch.cat([samples[start:stop] for samples, start, stop in runs])


@functools.cache
def _stride(size: int, columns: int) -> int:
    """A step that shares no divisor with a row, and so comes through every column."""
    stride = max(1, size // _SAMPLE)
    while math.gcd(stride, columns) > 1:
        stride -= 1
    return stride


def _on_host(scalars: list[Tensor | None]) -> list[float | None]:
    """All of them in one transfer a device."""
    found: list[float | None] = [None] * len(scalars)
    by_device: dict[torch.device, list[int]] = {}
    for place, scalar in enumerate(scalars):
        if scalar is not None:
            by_device.setdefault(scalar.device, []).append(place)
    for places in by_device.values():
        together = torch.stack([s.float() for i in places if (s := scalars[i]) is not None])
        for place, value in zip(places, together.tolist(), strict=True):
            found[place] = value
    return found
