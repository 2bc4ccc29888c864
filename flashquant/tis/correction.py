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
from flashquant.tis.ratios import checked_mask, exponential, log_ratios, row_mean, row_sum
from flashquant.tis.rejection import Over, Rejection, one_of, ordered
from flashquant.tis.totals import Denominator

Level = Literal["token", "sequence", "geometric"]
Reduce = Literal["token-mean", "sequence-mean"]

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
            over sequences), or over what a `denominator` is of; what a counted rejection took is in
            that mean as 0, what another one took is in it with its weight.
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
            one_of("level", self.level, get_args(Level))
        elif self.normalize:
            raise CorrectionError("normalize=True, but level=None has no weights. Give a level.")
        # exp(88) is the last that float32 holds, and chi2 adds up squares.
        if not 0 < self.safety_bound <= 30:
            raise CorrectionError(
                f"safety_bound={self.safety_bound:g}, but is above 0 and at most 30, so that "
                "squares of ratios add up in float32. 20 is usual."
            )
        ordered("floor", self.floor, "cap", self.cap, positive=True)
        for name, value in self._ratio_bounds():
            if abs(math.log(value)) > self.safety_bound:
                raise CorrectionError(
                    f"{name}={value:g}, but ratios are kept within exp(±{self.safety_bound:g}), "
                    "so it would never be met. Use None for no bound."
                )

    def __call__(
        self,
        trainer_logprobs: Tensor,
        rollout_logprobs: Tensor,
        mask: Tensor,
        *,
        denominator: Denominator | None = None,
    ) -> Corrected:
        """Weights, the tokens that are left, and metrics; without a gradient, in float32.

        Args:
            trainer_logprobs: `[B, T]`, any floating type.
            rollout_logprobs: `[B, T]`, as the engine returned them.
            mask: `[B, T]`, bool or 0 and 1. Whatever stands on masked tokens has no influence.
            denominator: of all micro-batches and ranks, for `normalize=True`. None: these rows are
                the whole batch.

        Raises:
            CorrectionError: a log-prob of an unmasked token is not finite, or shapes differ.

        """
        with torch.no_grad():
            unmasked = checked_mask(
                mask, trainer_logprobs=trainer_logprobs, rollout_logprobs=rollout_logprobs
            )
            log_ratio = log_ratios(trainer_logprobs, rollout_logprobs, unmasked)
            return self._correct(log_ratio, unmasked, denominator)

    def denominator(
        self,
        trainer_logprobs: Tensor,
        rollout_logprobs: Tensor,
        mask: Tensor,
        *,
        reduce: Reduce = "token-mean",
    ) -> Denominator:
        """What these rows add to the denominator of a loss over several micro-batches and ranks.

        Args:
            trainer_logprobs: `[B, T]`, those that `loss` will correct: `old_logprobs`, or in bypass
                mode the policy's own.
            rollout_logprobs: `[B, T]`, as the engine returned them.
            mask: `[B, T]`, as for `loss`.
            reduce: as for `loss`.

        Raises:
            CorrectionError: a log-prob of an unmasked token is not finite, or shapes differ.

        """
        one_of("reduce", reduce, get_args(Reduce))
        with torch.no_grad():
            unmasked = checked_mask(
                mask, trainer_logprobs=trainer_logprobs, rollout_logprobs=rollout_logprobs
            )
            log_ratio = log_ratios(trainer_logprobs, rollout_logprobs, unmasked)
            kept, keep_mask, zeroed = self._reject(log_ratio, unmasked)
            terms = keep_mask if reduce == "token-mean" else keep_mask.any(-1)
            weight = self._bounded(self._ratio(log_ratio, kept if self.chained else unmasked))
            return self._denominator(weight, unmasked, zeroed, terms)

    def _correct(
        self, log_ratio: Tensor, mask: Tensor, denominator: Denominator | None
    ) -> Corrected:
        kept, keep_mask, zeroed = self._reject(log_ratio, mask)
        ratio = self._ratio(log_ratio, kept if self.chained else mask)
        units = self._units(mask)
        weight = self._bounded(ratio)
        clipped = weight != ratio if self.level else torch.zeros_like(units)
        if self.normalize:
            whole = denominator or self._denominator(weight, mask, zeroed, keep_mask)
            average = whole.average_weight()
            weight = weight / torch.where(average > 0, average, 1.0)
        metrics = measure(
            log_ratio,
            mask,
            kept,
            # How far apart the policies are: whatever was rejected.
            ratio=self._ratio(log_ratio, mask),
            weight=weight * self._units(kept),
            clipped=clipped,
            units=units,
            bound=self.safety_bound,
        )
        return Corrected(weight * kept, keep_mask, metrics)

    def _denominator(
        self, weight: Tensor, mask: Tensor, zeroed: Tensor, terms: Tensor
    ) -> Denominator:
        counted = self._units(mask & ~zeroed)
        return Denominator(
            terms=terms.sum().double(),
            units=self._units(mask).sum().double(),
            weight=torch.where(counted, weight, 0.0).sum(dtype=torch.float64),
        )

    def _ratio(self, log_ratio: Tensor, mask: Tensor) -> Tensor:
        return exponential(self._at_level(log_ratio, mask), self.safety_bound)

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
    one_of("level", level, get_args(Level))
    rejection = Rejection("ratio", over=over[level], low=low, high=high, counted=True)
    return Correction(level=level, cap=None, rejections=(rejection,))


def icepop(low: float = 0.5, high: float = 5.0) -> Correction:
    """IcePop: token MIS with two bounds."""
    return masked(low, high)
