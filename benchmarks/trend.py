"""Whether a series of measurements goes up, and how sure one can be."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import pairwise
from statistics import fmean, linear_regression
from typing import NamedTuple

_BLOCKS = 20


class Trend(NamedTuple):
    """Slope of a least-squares line, and its standard error."""

    slope: float
    error: float

    def times(self, factor: float) -> Trend:
        return Trend(self.slope * factor, self.error * factor)


def trend(x: Sequence[float], y: Sequence[float]) -> Trend:
    """The slope of y over x.

    The standard error is a jackknife that leaves out one of 20 consecutive blocks at a time:
    what moves in steps has residuals that are alike among neighbours, and the textbook error,
    which takes each for news of its own, would be too small.
    """
    count = len(x)
    edges = [block * count // _BLOCKS for block in range(_BLOCKS + 1)]
    without = [
        linear_regression([*x[:low], *x[high:]], [*y[:low], *y[high:]]).slope
        for low, high in pairwise(edges)
    ]
    centre = fmean(without)
    spread = sum((slope - centre) ** 2 for slope in without)
    return Trend(linear_regression(x, y).slope, ((_BLOCKS - 1) / _BLOCKS * spread) ** 0.5)
