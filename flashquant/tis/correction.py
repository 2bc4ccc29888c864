"""Settings of a correction, and the weights they give.

    ratio = pi_trainer / pi_rollout      of a token, of a sequence, or its geometric mean
    weight = clamp(ratio, floor, cap)    and 0 where a rejection says so

Truncating keeps every token and bounds what it weighs; rejecting says that a token, or a whole
sequence, is too far off to teach anything. A rejected token either leaves the mean of the loss, or
is still *counted* in it with weight 0 (MIS, IcePop).
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Literal, NamedTuple, get_args

import torch
from torch import Tensor

from flashquant.errors import CorrectionError
from flashquant.tis.metrics import Metrics, measure
from flashquant.tis.ratios import checked_mask, exponential, log_ratios, mean, row_mean, row_sum

Level = Literal["token", "sequence", "geometric"]
Statistic = Literal["ratio", "k1", "k2", "k3"]
Over = Literal["token", "any", "sum", "mean"]

_SAFETY_BOUND = 20.0


class Corrected(NamedTuple):
    """What to do with each token of a loss.

    Attributes:
        weights: `[B, T]` float32, detached; 0 where masked or rejected.
        keep_mask: `[B, T]` bool; the tokens over which the loss is a mean.
        metrics: how far the policies are apart, and what was done about it.

    """

    weights: Tensor
    keep_mask: Tensor
    metrics: Metrics


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
        _one_of("statistic", self.statistic, get_args(Statistic))
        _one_of("over", self.over, get_args(Over))
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
        _ordered("low", self.low, "high", self.high, positive=self.statistic != "k1")

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


@dataclass(frozen=True)
class Correction:
    """How a loss is corrected for rollouts of a policy that is a little off.

    Attributes:
        level: whose ratio weighs a token: its own ("token"), the product over its "sequence", or
            that product's "geometric" mean; None: weights are 1, only rejections act.
        cap: the largest weight, or None.
        floor: the smallest weight, or None. Ratios below are raised to it.
        rejections: all must let a token pass.
        chained: whether each rejection, and after them the ratio of a sequence, looks only at
            the tokens that those before it kept. By default each looks at all unmasked tokens.
        normalize: divide the weights by their mean over the batch that is given (over tokens, or
            over sequences); what a counted rejection took is in that mean as 0, what another one
            took is in it with its weight.
        safety_bound: a log ratio is clamped to plus or minus this before it is exponentiated.

    """

    level: Level | None = "token"
    cap: float | None = 2.0
    floor: float | None = None
    rejections: tuple[Rejection, ...] = ()
    chained: bool = False
    normalize: bool = False
    safety_bound: float = _SAFETY_BOUND

    def __post_init__(self) -> None:
        """Refuse settings that contradict each other.

        Raises:
            CorrectionError: says which.

        """
        if self.level is not None:
            _one_of("level", self.level, get_args(Level))
        elif self.normalize:
            raise CorrectionError("normalize=True, but level=None has no weights. Give a level.")
        # exp(88) is the last that float32 holds, and chi2 adds up squares.
        if not 0 < self.safety_bound <= 30:
            raise CorrectionError(
                f"safety_bound={self.safety_bound:g}, but is above 0 and at most 30, so that "
                "squares of ratios add up in float32. 20 is usual."
            )
        _ordered("floor", self.floor, "cap", self.cap, positive=True)
        for name, value in self._ratio_bounds():
            if abs(math.log(value)) > self.safety_bound:
                raise CorrectionError(
                    f"{name}={value:g}, but ratios are kept within exp(±{self.safety_bound:g}), "
                    "so it would never be met. Use None for no bound."
                )

    def __call__(
        self, trainer_logprobs: Tensor, rollout_logprobs: Tensor, mask: Tensor
    ) -> Corrected:
        """Weights, the tokens that are left, and metrics; without a gradient, in float32.

        Args:
            trainer_logprobs: `[B, T]`, any floating type.
            rollout_logprobs: `[B, T]`, as the engine returned them.
            mask: `[B, T]`, bool or 0 and 1. Whatever stands on masked tokens has no influence.

        Raises:
            CorrectionError: a log-prob of an unmasked token is not finite, or shapes differ.

        """
        with torch.no_grad():
            unmasked = checked_mask(
                mask, trainer_logprobs=trainer_logprobs, rollout_logprobs=rollout_logprobs
            )
            return self._correct(log_ratios(trainer_logprobs, rollout_logprobs, unmasked), unmasked)

    def _correct(self, log_ratio: Tensor, mask: Tensor) -> Corrected:
        kept, keep_mask, zeroed = self._reject(log_ratio, mask)
        seen = kept if self.chained else mask
        ratio = exponential(self._at_level(log_ratio, seen), self.safety_bound)
        units = self._units(mask)
        weight = self._bounded(ratio)
        clipped = weight != ratio if self.level else torch.zeros_like(units)
        if self.normalize:
            average = mean(weight * self._units(mask & ~zeroed), units)
            weight = weight / torch.where(average > 0, average, 1.0)
        metrics = measure(
            log_ratio,
            mask,
            kept,
            # How far apart the policies are: whatever was rejected.
            ratio=exponential(self._at_level(log_ratio, mask), self.safety_bound),
            weight=weight * self._units(kept),
            clipped=clipped,
            units=units,
            bound=self.safety_bound,
        )
        return Corrected(weight * kept, keep_mask, metrics)

    def _reject(self, log_ratio: Tensor, mask: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Tokens that no rejection took; that are still counted; that are counted with weight 0."""
        kept, keep_mask, zeroed = mask, mask, torch.zeros_like(mask)
        for rejection in self.rejections:
            seen = kept if self.chained else mask
            stays = rejection.keeps(log_ratio, seen, self.safety_bound)
            kept = kept & stays
            if rejection.counted:
                zeroed = zeroed | (mask & ~stays)
            else:
                keep_mask = keep_mask & stays
        return kept, keep_mask, zeroed

    def _at_level(self, log_ratio: Tensor, mask: Tensor) -> Tensor:
        match self.level:
            case "sequence":
                return row_sum(log_ratio, mask)
            case "geometric":
                return row_mean(log_ratio, mask)
            case _:
                return log_ratio

    def _units(self, mask: Tensor) -> Tensor:
        """What has a ratio of its own: tokens, or sequences with an unmasked token."""
        return mask.any(-1, keepdim=True) if self.level in ("sequence", "geometric") else mask

    def _bounded(self, ratio: Tensor) -> Tensor:
        if self.level is None:
            return torch.ones_like(ratio)
        if self.floor is None and self.cap is None:
            return ratio
        return ratio.clamp(self.floor, self.cap)

    def _ratio_bounds(self) -> list[tuple[str, float]]:
        bounds = [("cap", self.cap), ("floor", self.floor)]
        for rejection in self.rejections:
            if rejection.statistic == "ratio":
                bounds += [("low", rejection.low), ("high", rejection.high)]
        return [(name, value) for name, value in bounds if value is not None]


def masked(low: float | None, high: float | None, *, level: Level = "token") -> Correction:
    """MIS: the ratio itself within the bounds, 0 outside of them; the loss counts both."""
    over: dict[Level, Over] = {"token": "token", "sequence": "sum", "geometric": "mean"}
    _one_of("level", level, get_args(Level))
    rejection = Rejection("ratio", over=over[level], low=low, high=high, counted=True)
    return Correction(level=level, cap=None, rejections=(rejection,))


def icepop(low: float = 0.5, high: float = 5.0) -> Correction:
    """IcePop: token MIS with two bounds."""
    return masked(low, high)


def _one_of(name: str, value: str, choices: tuple[str, ...]) -> None:
    if value not in choices:
        raise CorrectionError(f"{name}={value!r}, but is one of {', '.join(map(repr, choices))}")


def _ordered(
    low_name: str, low: float | None, high_name: str, high: float | None, *, positive: bool
) -> None:
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
