"""Whether an arm ends where bf16 ends: the difference, seed by seed, and its interval.

Both arms of a seed begin from the same weights and are asked the same sums, so what is compared is
the difference within a seed: a paired t-interval at 95 %. That it contains 0 only says that
nothing was seen, and noisy runs would always pass; an arm ends where bf16 ends if all of the
interval lies within a margin that was set beforehand.
"""

from __future__ import annotations

import math
from collections import defaultdict
from dataclasses import dataclass
from statistics import fmean, stdev
from typing import Any

# A run's end is the mean of its last looks: one look alone is noisier than the run.
_LOOKS = 3
# Two-sided 95 % quantiles of Student's t, by degrees of freedom.
_QUANTILES = (12.706, 4.303, 3.182, 2.776, 2.571, 2.447, 2.365, 2.306, 2.262, 2.228, 2.201)


@dataclass(frozen=True)
class Interval:
    """Of the mean difference between two arms."""

    mean: float
    half_width: float

    def is_within(self, margin: float) -> bool:
        """Whether the arms differ by less than the margin, at 97.5 % on either side."""
        return abs(self.mean) + self.half_width <= margin

    def __str__(self) -> str:
        return f"{self.mean:+.3f} ± {self.half_width:.3f}"


def ends(lines: list[dict[str, Any]], arm: str) -> dict[int, float]:
    """Of each seed of an arm, the held-out accuracy that it came to."""
    looks: dict[int, list[float]] = defaultdict(list)
    for line in lines:
        if line["arm"] == arm and "accuracy" in line:
            looks[line["seed"]].append(line["accuracy"])
    return {seed: fmean(found[-_LOOKS:]) for seed, found in looks.items()}


def difference(lines: list[dict[str, Any]], arm: str, reference: str) -> Interval | None:
    """How much better an arm ends than another; None with fewer than two seeds in common."""
    own, other = ends(lines, arm), ends(lines, reference)
    paired = [own[seed] - other[seed] for seed in sorted(own.keys() & other.keys())]
    if len(paired) < 2:
        return None
    quantile = _QUANTILES[min(len(paired) - 1, len(_QUANTILES)) - 1]
    return Interval(fmean(paired), quantile * stdev(paired) / math.sqrt(len(paired)))
