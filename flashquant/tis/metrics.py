"""How far the two policies are apart, and what the correction did about it."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, fields

import torch
from torch import Tensor
from torch import distributed as dist

from flashquant.tis.ratios import exponential, mean, row_mean
from flashquant.tis.totals import gathered, pooled


@dataclass(frozen=True)
class Metrics:
    """0-d float32 tensors on the device of the log-probs; nothing here waits for a GPU.

    With r = pi_trainer / pi_rollout. "Units" are what has a ratio of its own: unmasked tokens, or,
    where the weights are a sequence's, sequences with an unmasked token. Rejected ones are units
    too, of weight 0. Without any, everything is 0.

    Attributes:
        tokens: unmasked tokens.
        units: see above.
        sequences: rows with an unmasked token.
        k1: mean of -log r over tokens: KL(rollout, trainer), unbiased, may be negative.
        k3: mean of r - 1 - log r over tokens: the same, never negative.
        chi2: mean of r^2 - 1 over units: what the variance of unbounded weights grows with.
        ess: (sum w)^2 / (n * sum w^2) over n units: which part of the batch is effectively there.
        ratio_max: the largest r of a unit, before any bound but the safety bound.
        weight_mean: mean w over units.
        clipped_fraction: units whose r was cut to the cap or raised to the floor.
        rejected_fraction: unmasked tokens with weight 0.
        perplexity_ratio: perplexity under the trainer over that under the rollout, a sequence;
            mean over sequences.

    """

    tokens: Tensor
    units: Tensor
    sequences: Tensor
    k1: Tensor
    k3: Tensor
    chi2: Tensor
    ess: Tensor
    ratio_max: Tensor
    weight_mean: Tensor
    clipped_fraction: Tensor
    rejected_fraction: Tensor
    perplexity_ratio: Tensor

    def to_dict(self, prefix: str = "") -> dict[str, Tensor]:
        """By name, for a logger: `metrics.to_dict("rollout_corr/")`."""
        return {f"{prefix}{field.name}": getattr(self, field.name) for field in fields(self)}

    def reduce(self, group: dist.ProcessGroup | None = None) -> Metrics:
        """Of all ranks of a group together, as one process with the whole batch would have them.

        Every rank calls it, with whole sequences in its rows. None: torch's default group.
        """
        return Metrics.merge([Metrics(*rank) for rank in gathered(self._values(), group)])

    @staticmethod
    def merge(parts: Sequence[Metrics]) -> Metrics:
        """Of several micro-batches together."""
        (tokens, units, sequences, k1, k3, chi2, ess, ratio_max, weight, clipped, rejected, ppl) = (
            torch.stack([part._values() for part in parts]).unbind(1)
        )
        # ess is mean(w)^2 / mean(w^2); where it is 0, so is every weight.
        squares = torch.where(ess > 0, weight.square() / ess.clamp(min=1e-300), 0.0)
        square = pooled(squares, units)
        together = (
            tokens.sum(),
            units.sum(),
            sequences.sum(),
            pooled(k1, tokens),
            pooled(k3, tokens),
            pooled(chi2, units),
            pooled(weight, units).square() / torch.where(square > 0, square, 1.0),
            ratio_max.max(),
            pooled(weight, units),
            pooled(clipped, units),
            pooled(rejected, tokens),
            pooled(ppl, sequences),
        )
        return Metrics(*(value.float() for value in together))

    def _values(self) -> Tensor:
        """`[fields]` float64, in their order."""
        return torch.stack([getattr(self, field.name) for field in fields(self)]).double()


def measure(
    log_ratio: Tensor,
    mask: Tensor,
    kept: Tensor,
    *,
    ratio: Tensor,
    weight: Tensor,
    clipped: Tensor,
    units: Tensor,
    bound: float,
) -> Metrics:
    """The metrics of one correction.

    Args:
        log_ratio: of each token, `[B, T]`, 0 where masked.
        mask: the tokens that were asked about.
        kept: those of them that no rejection took.
        ratio: of each unit, of all its unmasked tokens.
        weight: of each unit, 0 where it was rejected.
        clipped: units whose ratio met the cap or the floor.
        units: which places hold one.
        bound: the safety bound.

    """
    within = log_ratio.clamp(-bound, bound)
    rows = mask.any(-1, keepdim=True)
    return Metrics(
        tokens=mask.sum().float(),
        units=units.sum().float(),
        sequences=rows.sum().float(),
        k1=mean(-log_ratio, mask),
        k3=mean(within.exp() - 1 - within, mask),
        chi2=mean(ratio.square() - 1, units),
        ess=_effective_sample_size(weight, units),
        ratio_max=_largest(torch.where(units, ratio, 0.0)),
        weight_mean=mean(weight, units),
        clipped_fraction=mean(clipped.float(), units),
        rejected_fraction=mean((~kept).float(), mask),
        perplexity_ratio=mean(exponential(-row_mean(log_ratio, mask), bound), rows),
    )


def _effective_sample_size(weight: Tensor, units: Tensor) -> Tensor:
    # Of means, not of sums: n times a sum of squares could leave float32.
    squares = mean(weight.square(), units)
    return mean(weight, units).square() / torch.where(squares > 0, squares, 1.0)


def _largest(values: Tensor) -> Tensor:
    return values.max() if values.numel() else values.new_zeros(())
