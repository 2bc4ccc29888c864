"""What is too far off to teach anything: a token, or a whole sequence."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Literal, get_args

import torch
from torch import Tensor

from flashquant.errors import CorrectionError
from flashquant.tis.ratios import exponential, row_mean, row_sum

Statistic = Literal["ratio", "k1", "k2", "k3"]
Over = Literal["token", "any", "sum", "mean"]


@dataclass(frozen=True)
class Rejection:
    """Leave out what is too far off; bounds are inclusive.

    With r = pi_trainer / pi_rollout:

        Rejection("ratio", over="mean", low=0.99, high=1.01)   a sequence, by its geometric mean
        Rejection("ratio", over="any", low=1e-4)               a sequence, by one token: a veto
        Rejection("k3", over="mean", high=0.01)                a sequence, by its KL
        Rejection("ratio", low=0.5, high=5.0, counted=True)    a token: IcePop

    Attributes:
        statistic: "ratio" is r; "k1" is -log r, "k2" half its square, "k3" r - 1 - log r. A
            token's log r is clamped to the safety bound for a k; for "ratio", the sum or mean is.
        over: what is judged: each "token" by its own value; or a whole sequence, if "any" token
            of it is out of bounds, or by the "sum" or "mean" over its tokens. For "ratio" these
            are taken of log r: "sum" is the product, "mean" the geometric mean.
        low: the smallest value that stays, or None. k2 and k3 have none.
        high: the largest value that stays, or None.
        counted: whether the mean of the loss still counts what was rejected.

    """

    statistic: Statistic
    over: Over = "token"
    low: float | None = None
    high: float | None = None
    counted: bool = False

    def __post_init__(self) -> None:
        """Refuse bounds that mean nothing.

        Raises:
            CorrectionError: says which.

        """
        one_of("statistic", self.statistic, get_args(Statistic))
        one_of("over", self.over, get_args(Over))
        if self.low is None and self.high is None:
            raise CorrectionError(
                f"a rejection by {self.statistic} has neither low nor high, so it rejects nothing. "
                "Give one of them, or leave the rejection out."
            )
        if self.statistic in ("k2", "k3") and self.low is not None:
            raise CorrectionError(
                f"low={self.low:g} for {self.statistic}, which is 0 where the policies agree. "
                "Give high alone."
            )
        ordered("low", self.low, "high", self.high, positive=self.statistic != "k1")

    def keeps(self, log_ratio: Tensor, mask: Tensor, bound: float) -> Tensor:
        """Which tokens `[B, T]`, or sequences `[B, 1]`, stay; only unmasked tokens are judged."""
        if self.over in ("token", "any"):
            stays = self._within(self._of_tokens(log_ratio, bound)) | ~mask
            return stays if self.over == "token" else stays.all(-1, keepdim=True)
        gather = row_sum if self.over == "sum" else row_mean
        if self.statistic == "ratio":
            return self._within(exponential(gather(log_ratio, mask), bound))
        return self._within(gather(self._of_tokens(log_ratio, bound), mask))

    def _of_tokens(self, log_ratio: Tensor, bound: float) -> Tensor:
        clamped = log_ratio.clamp(-bound, bound)
        match self.statistic:
            case "ratio":
                return clamped.exp()
            case "k1":
                return -clamped
            case "k2":
                return clamped.square() / 2
            case "k3":
                return clamped.exp() - 1 - clamped

    def _within(self, value: Tensor) -> Tensor:
        stays = torch.ones_like(value, dtype=torch.bool)
        if self.low is not None:
            stays &= value >= self.low
        if self.high is not None:
            stays &= value <= self.high
        return stays


def one_of(name: str, value: str, choices: tuple[str, ...]) -> None:
    """Refuse a name that is none of the choices."""
    if value not in choices:
        raise CorrectionError(f"{name}={value!r}, but is one of {', '.join(map(repr, choices))}")


def ordered(
    low_name: str, low: float | None, high_name: str, high: float | None, *, positive: bool
) -> None:
    """Refuse bounds that are no numbers, or exchanged."""
    for name, value in ((low_name, low), (high_name, high)):
        if value is None:
            continue
        if not math.isfinite(value) or (positive and value <= 0):
            wanted = "a number above 0" if positive else "a finite number"
            raise CorrectionError(f"{name}={value:g}, but is {wanted}, or None for no bound")
    if low is not None and high is not None and low > high:
        raise CorrectionError(
            f"{low_name}={low:g} is above {high_name}={high:g}. Exchange them, or give one alone."
        )
