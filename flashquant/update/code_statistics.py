"""How far pushed weights move their codes: in every report, cheap enough to leave on.

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
from dataclasses import dataclass, replace
from itertools import accumulate, groupby, repeat
from typing import Final

import numpy as np
import torch
from torch import Tensor

from flashquant.profiles import Clipping
from flashquant.schemes import holds_codes
from flashquant.update.report import Drift

logger = logging.getLogger(__name__)

_SAMPLE: Final = 1024


@dataclass(frozen=True)
class Noted:
    """What an update under way brings of one weight; nothing of it counts until it is committed.

    Attributes:
        sample: of its codes, int8: a copy, or a view of live memory, which holds them then.

    """

    size: int
    sample: Tensor
    clipping: Clipping | None


# A committed sample: where it starts and stops in a tensor that holds those of other weights too.
Standing = tuple[Tensor, int, int]


class CodeStatistics:
    """Samples of the committed codes, and the warning when frozen scales no longer fit.

    Args:
        warn_above: the fraction of a weight that may be clipped before the log warns.

    """

    def __init__(self, warn_above: float = 1.0) -> None:
        self._standing: dict[str, Standing] = {}
        self._warn_above = warn_above

    def start(self, name: str, values: Tensor) -> None:
        """The engine starts on these codes; other dtypes are passed over."""
        if holds_codes(values.dtype):
            sample = _sampled(values).clone()
            self._standing[name] = (sample, 0, len(sample))

    def forget(self) -> None:
        """The codes are about to be lost: the next ones have nothing to be compared with."""
        self._standing.clear()

    def note(self, name: str, values: Tensor, clipping: Clipping | None) -> Noted | None:
        """What a push makes of one weight; None for what is no codes. Waits for no device."""
        if not holds_codes(values.dtype):
            return None
        return Noted(values.numel(), _sampled(values).clone(), clipping)

    def settle(self, noted: Mapping[str, Noted]) -> dict[str, Drift]:
        """An update is committed: the next one is compared with what it brought."""
        changed: dict[str, float] = {}
        for _, there in groupby(noted.items(), lambda item: item[1].sample.device):
            now = _together(dict(there))
            changed |= self._changed(now)
            self._standing |= now
        drifts = {name: Drift(note.size, changed.get(name)) for name, note in noted.items()}
        clipping = {name: c for name, note in noted.items() if (c := note.clipping) is not None}
        outside = _on_host(c.outside for c in clipping.values())
        peaks = _on_host(c.peak for c in clipping.values())
        for name, out, peak in zip(clipping, outside, peaks, strict=True):
            drifts[name] = replace(drifts[name], clipped=out / noted[name].size, peak=peak)
        self._warn({name: drifts[name] for name in clipping})
        return drifts

    def _changed(self, now: Mapping[str, Standing]) -> dict[str, float]:
        """The fraction of each sample that is other than before, of all of them at once."""
        pairs = {
            name: (new, old)
            for name, new in now.items()
            if (old := self._standing.get(name)) is not None
            and old[2] - old[1] == new[2] - new[1] > 0
            and old[0].device == new[0].device
        }
        if not pairs:
            return {}
        fresh, known = (_joined(samples) for samples in zip(*pairs.values(), strict=True))
        sizes = np.array([stop - start for (_, start, stop), _ in pairs.values()])
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


def _together(noted: Mapping[str, Noted]) -> dict[str, Standing]:
    """Samples of one device, copied into one tensor one after another."""
    samples = [note.sample for note in noted.values()]
    together = torch.cat(samples)
    stops = list(accumulate(sample.numel() for sample in samples))
    places = zip(repeat(together), (0, *stops), stops, strict=False)
    return dict(zip(noted, places, strict=True))


def _joined(samples: Iterable[Standing]) -> Tensor:
    """Samples one after another; neighbours, which stand so already, are not taken apart."""
    runs: list[Standing] = []
    for together, start, stop in samples:
        if runs and together is runs[-1][0] and start == runs[-1][2]:
            runs[-1] = (together, runs[-1][1], stop)
        else:
            runs.append((together, start, stop))
    parts = [together[start:stop] for together, start, stop in runs]
    return parts[0] if len(parts) == 1 else torch.cat(parts)


@functools.cache
def _stride(size: int, columns: int) -> int:
    """A step that shares no divisor with a row, and so comes through every column."""
    stride = max(1, size // _SAMPLE)
    while math.gcd(stride, columns) > 1:
        stride -= 1
    return stride


def _on_host(scalars: Iterable[Tensor]) -> list[float]:
    """All of them, with one wait for each run of one device."""
    return [
        value
        for _, there in groupby(scalars, lambda scalar: scalar.device)
        for value in torch.stack([scalar.float() for scalar in there]).tolist()
    ]
