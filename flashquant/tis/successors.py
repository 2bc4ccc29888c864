"""What came after truncation: trust regions of whole sequences, and steps as long as they are sure.

Decoupled PPO (2110.00641; AReaL's `use_decoupled_loss`) needs nothing of its own: it is `loss` with
the proximal policy's log-probs as `old_logprobs`, the behaviour policy's as `rollout_logprobs`, and
`Correction(cap=None)`. DPPO is an option of `loss`, too.
"""

from __future__ import annotations

import math
from typing import Literal, cast, get_args

import torch
from torch import Tensor
from torch import distributed as dist

from flashquant.errors import CorrectionError
from flashquant.tis.correction import Correction, Level
from flashquant.tis.ratios import checked_mask, log_ratios, row_sum
from flashquant.tis.rejection import Over, Rejection, Statistic, one_of
from flashquant.tis.totals import gathered

ScalingRule = Literal["sqrt", "linear"]


def trm(
    *,
    max_log_ratio: float | None = None,
    mean_kl: float | None = None,
    level: Level | None = None,
    cap: float | None = None,
) -> Correction:
    """Trust Region Masking (2512.23075): a sequence with a token out of the region teaches nothing.

    The paper bounds the largest KL of a token's distribution, and has these for a trainer that
    knows the sampled token's probability alone. Sequences leave the mean of the loss, as in verl
    (`rollout_rs="seq_max_k2,seq_mean_k3"`, whose k2 is half the square of the log ratio).

    Args:
        max_log_ratio: the largest |log r| of a token of the sequence.
        mean_kl: the largest mean of k3 over its tokens, an estimate of the mean KL.
        level: a ratio beside it, as in `Correction`; None for none, as in the paper, whose loss
            has pi / pi_rollout itself: give `loss` no `old_logprobs`.
        cap: its cap.

    Raises:
        CorrectionError: neither is given, or one is not above 0.

    """
    if max_log_ratio is None and mean_kl is None:
        raise CorrectionError("trm has neither max_log_ratio nor mean_kl, so it masks nothing")
    found = []
    if max_log_ratio is not None:
        if not max_log_ratio > 0:
            raise CorrectionError(f"max_log_ratio={max_log_ratio:g}, but is above 0")
        found.append(Rejection("k2", "any", high=max_log_ratio**2 / 2))
    if mean_kl is not None:
        found.append(Rejection("k3", "mean", high=mean_kl))
    return Correction(level=level, cap=cap, rejections=tuple(found))


def from_areal(
    *,
    level: str = "token",
    action: str = "mask",
    metric: str = "ratio",
    agg: str = "mean",
    upper: float = 5.0,
    lower: float | None = None,
) -> Correction:
    """AReaL's decoupled loss: `actor.rejection_sampling`; `Correction(cap=None)` where it is null.

    `loss` then takes its proximal policy as `old_logprobs`, its behaviour policy as
    `rollout_logprobs`.
    The older `behave_imp_weight_cap` is `upper`, with the action "mask".

    * "mask" leaves the ratio unbounded within the bounds, and takes what is outside of them out of
      the mean of the loss; "clamp" is for ratios alone.
    * kl_k1 is log r there, not -log r.
    * A whole sequence is judged by the geometric mean of its ratios, which is then its weight, too.
      Other ways to judge one are refused: what AReaL weighs its tokens with then is not known here.
    """
    one_of("level", level, ("token", "sequence"))
    one_of("action", action, ("mask", "clamp"))
    one_of("metric", metric, ("ratio", "kl_k1", "kl_k2", "kl_k3"))
    if level == "sequence" and (metric, agg) != ("ratio", "mean"):
        raise CorrectionError(
            f"level='sequence' with metric={metric!r} and agg={agg!r}, of which 'ratio' and 'mean' "
            "are known here. Write a Correction of your own."
        )
    low = lower or None  # as a bound of a ratio, 0 is none
    weighs: Level = "token" if level == "token" else "geometric"
    if action == "clamp":
        if metric != "ratio":
            raise CorrectionError(f"action='clamp' with metric={metric!r}, but bounds ratios alone")
        return Correction(level=weighs, cap=upper, floor=low)
    over: Over = "token" if level == "token" else "mean"
    by: Statistic = "ratio"
    if metric != "ratio":
        by = cast(Statistic, metric.removeprefix("kl_"))
    if by == "k1":
        rejection = Rejection("k1", over, low=-upper, high=None if lower is None else -lower)
    else:
        rejection = Rejection(by, over, low=low if by == "ratio" else lower, high=upper)
    return Correction(level=weighs, cap=None, rejections=(rejection,))


def effective_sample_size(
    trainer_logprobs: Tensor,
    rollout_logprobs: Tensor,
    mask: Tensor,
    *,
    group: dist.ProcessGroup | None = None,
) -> Tensor:
    """VCPO's (2602.17616): (sum w)^2 / (n * sum w^2) of the sequences' own ratios, unbounded.

    Between 1/n, where one sequence outweighs all others, and 1; a 0-d float32, 0 without any
    sequence. Added up in logarithms, so that neither a long sequence nor the safety bound hides it.

    Args:
        trainer_logprobs: `[B, T]`, recomputed by the trainer.
        rollout_logprobs: `[B, T]`, as the engine returned them.
        mask: `[B, T]`, True on the tokens that the policy chose.
        group: data-parallel ranks, which all call this; None: torch's default group, or none.

    Raises:
        CorrectionError: a log-prob of an unmasked token is not finite, or shapes differ.

    """
    with torch.no_grad():
        unmasked = checked_mask(
            mask, trainer_logprobs=trainer_logprobs, rollout_logprobs=rollout_logprobs
        )
        log_ratio = log_ratios(trainer_logprobs, rollout_logprobs, unmasked).double()
        rows = unmasked.any(-1)
        log_weight = row_sum(log_ratio, unmasked).squeeze(-1).masked_fill(~rows, -math.inf)
        # logsumexp of nothing, or of -inf alone, is -inf: nothing was added.
        here = torch.stack(
            [log_weight.logsumexp(0), (2 * log_weight).logsumexp(0), rows.sum().double()]
        )
        sums, squares, counts = gathered(here, group).unbind(-1)
        count = counts.sum()
        log_ess = 2 * sums.logsumexp(0) - squares.logsumexp(0) - count.log()
        return torch.where(count > 0, log_ess.exp(), 0.0).float()


def step_scale(
    ess: Tensor | float, *, base_ess_ratio: float = 1.0, scaling_rule: ScalingRule = "sqrt"
) -> float:
    """VCPO's factor on the learning rate: the root of the effective sample size over its usual one.

    Names and defaults are those of the authors' `actor.ess_scaling`. Multiply each parameter
    group's rate by it for this one step; 0 where no sequence was left.

    Args:
        ess: `effective_sample_size(...)`; waits for the device.
        base_ess_ratio: what it is on-policy, where noise alone keeps it below 1.
        scaling_rule: "sqrt" for optimizers like AdamW, "linear" for SGD.

    Raises:
        CorrectionError: base_ess_ratio is not above 0 and at most 1.

    """
    one_of("scaling_rule", scaling_rule, get_args(ScalingRule))
    if not 0 < base_ess_ratio <= 1:
        raise CorrectionError(f"base_ess_ratio={base_ess_ratio:g}, but is above 0 and at most 1")
    share = float(ess) / base_ess_ratio
    return share if scaling_rule == "linear" else math.sqrt(share)
