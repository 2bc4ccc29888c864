"""The policy-gradient loss of PPO and DAPO, with the correction in its right place.

    ratio  = pi / pi_old                              what PPO clips: steps since old_logprobs
    weight = pi_old / pi_rollout, bounded             what the correction gives: fp8 against bf16
    loss   = -mean(weight * min(ratio * A, clip(ratio) * A))

The weight stands outside of the clip and carries no gradient: gradients flow through pi alone.

The two ratios share pi_old, and may not overlap. Without a recomputed `old_logprobs`, PPO's ratio
is pi / pi_rollout: it then contains the correction, and a weight beside it would count the same
mismatch twice. So `old_logprobs=None` says just that (verl calls it bypass mode): nothing is
multiplied, and what the correction would reject is still rejected.

Decoupled PPO is this loss with pi_old as the proximal policy, and `Correction(cap=None)`.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import get_args

import torch
from torch import Tensor
from torch import distributed as dist

from flashquant.errors import CorrectionError
from flashquant.tis.correction import Correction, Reduce
from flashquant.tis.metrics import Metrics
from flashquant.tis.ratios import checked_mask, exponential, log_ratios, mean, row_mean
from flashquant.tis.totals import Denominator, gathered, pooled
from flashquant.tis.trust import DPPO


@dataclass(frozen=True)
class LossMetrics:
    """0-d float32 tensors, detached.

    Attributes:
        correction: those of the correction; in bypass mode, of pi against pi_rollout.
        kept: tokens that the loss counts.
        clip_fraction: kept tokens at which PPO's clip, or DPPO's trust region, was in force.
        policy_k1: mean of -log ratio over kept tokens: how far pi has moved from what PPO compares
            it with.

    """

    correction: Metrics
    kept: Tensor
    clip_fraction: Tensor
    policy_k1: Tensor

    def to_dict(self, prefix: str = "") -> dict[str, Tensor]:
        """All of them by name, for a logger."""
        return self.correction.to_dict(prefix) | {
            f"{prefix}kept": self.kept,
            f"{prefix}clip_fraction": self.clip_fraction,
            f"{prefix}policy_k1": self.policy_k1,
        }

    def reduce(self, group: dist.ProcessGroup | None = None) -> LossMetrics:
        """Of all ranks of a group together: see `Metrics.reduce`."""
        own = torch.stack([self.kept, self.clip_fraction, self.policy_k1]).double()
        return _pooled(self.correction.reduce(group), gathered(own, group))

    @staticmethod
    def merge(parts: Sequence[LossMetrics]) -> LossMetrics:
        """Of several micro-batches together."""
        own = [torch.stack([p.kept, p.clip_fraction, p.policy_k1]).double() for p in parts]
        return _pooled(Metrics.merge([part.correction for part in parts]), torch.stack(own))


def _pooled(correction: Metrics, parts: Tensor) -> LossMetrics:
    kept, clipped, k1 = parts.unbind(-1)
    return LossMetrics(
        correction=correction,
        kept=kept.sum().float(),
        clip_fraction=pooled(clipped, kept).float(),
        policy_k1=pooled(k1, kept).float(),
    )


def _check_two(old_logprobs: Tensor | None, rollout_logprobs: Tensor) -> None:
    if old_logprobs is rollout_logprobs:
        raise CorrectionError(
            "old_logprobs is rollout_logprobs itself, so PPO's ratio contains the correction "
            "already, and this one would see no difference. Give old_logprobs=None."
        )


def loss(
    logprobs: Tensor,
    *,
    old_logprobs: Tensor | None,
    rollout_logprobs: Tensor,
    advantages: Tensor,
    mask: Tensor,
    correction: Correction,
    clip_low: float = 0.2,
    clip_high: float = 0.28,
    dppo: DPPO | None = None,
    reduce: Reduce = "token-mean",
    denominator: Denominator | Tensor | float | None = None,
) -> tuple[Tensor, LossMetrics]:
    """The clipped policy-gradient loss, corrected; a scalar in float32.

    Args:
        logprobs: `[B, T]` of the policy that is trained; the only argument that gets a gradient.
        old_logprobs: `[B, T]`, recomputed by the trainer before the first step on this batch. None:
            they are the rollout's, and no weights are applied (see the module).
        rollout_logprobs: `[B, T]`, as the engine returned them.
        advantages: `[B, T]`, `[B, 1]` or `[B]`.
        mask: `[B, T]`, True on the tokens that the policy chose: no prompt, tool output, padding.
        correction: `Correction(level=None)` for none.
        clip_low: PPO's ratio is clipped below at 1 - clip_low,
        clip_high: and above at 1 + clip_high. DAPO's clip-higher; give both alike for PPO.
        dppo: a trust region in the place of the clip, whose settings then mean nothing.
        reduce: "token-mean" counts every kept token alike (DAPO); "sequence-mean" every sequence
            that has one (the mean over its tokens).
        denominator: what the sum over tokens, or over sequences, is divided by. None: their number
            here, so that the batch that is given is all there is. For micro-batches and
            data-parallel ranks, of all of them: `Correction.denominator`, or a number.

    Raises:
        CorrectionError: a value of an unmasked token is not finite, shapes differ,
            `old_logprobs` is `rollout_logprobs` itself, or the denominator is not above 0, or a
            number although weights are normalized.

    """
    _check_two(old_logprobs, rollout_logprobs)
    _check_options(clip_low, clip_high, reduce)
    whole = _whole(denominator, correction)
    advantages = _spread(advantages.detach(), mask)
    unmasked = checked_mask(mask, logprobs=logprobs, advantages=advantages)
    bypass = old_logprobs is None
    trainer = logprobs.detach() if old_logprobs is None else old_logprobs.detach()
    weights, keep_mask, metrics = correction(trainer, rollout_logprobs, mask, denominator=whole)
    if bypass:
        weights = (weights > 0).float()
    anchor = rollout_logprobs.detach() if bypass else trainer
    log_ratio = log_ratios(logprobs, anchor, unmasked)
    wanted = torch.where(unmasked, advantages.float(), 0.0)
    if dppo is None:
        gain, held = _clipped(log_ratio, wanted, correction.safety_bound, clip_low, clip_high)
    else:
        at_anchor = torch.where(unmasked, anchor.float(), 0.0)
        gain, held = dppo.gain(log_ratio, at_anchor, wanted, correction.safety_bound)
    found = _found(metrics, keep_mask, held, log_ratio.detach())
    return _reduced(-weights * gain, keep_mask, reduce, denominator), found


def _found(metrics: Metrics, kept: Tensor, held: Tensor, log_ratio: Tensor) -> LossMetrics:
    return LossMetrics(
        correction=metrics,
        kept=kept.sum().float(),
        clip_fraction=mean(held.float(), kept),
        policy_k1=mean(-log_ratio, kept),
    )


def _clipped(
    log_ratio: Tensor, advantages: Tensor, bound: float, low: float, high: float
) -> tuple[Tensor, Tensor]:
    """PPO's gain of each token, and where its clip holds it back."""
    ratio = exponential(log_ratio, bound)
    free, clipped = ratio * advantages, ratio.clamp(1 - low, 1 + high) * advantages
    return torch.minimum(free, clipped), clipped < free


def _whole(
    denominator: Denominator | Tensor | float | None, correction: Correction
) -> Denominator | None:
    """What weights are normalized over."""
    if denominator is None or isinstance(denominator, Denominator):
        return denominator
    if correction.normalize:
        raise CorrectionError(
            "the denominator is a number, but normalize=True needs the mean weight of all "
            "micro-batches and ranks, too. Give what correction.denominator(...) returns."
        )
    if not isinstance(denominator, Tensor) and not denominator > 0:
        raise CorrectionError(f"denominator={denominator:g}, but is above 0: a count of terms")
    return None


def _check_options(clip_low: float, clip_high: float, reduce: str) -> None:
    if reduce not in get_args(Reduce):
        raise CorrectionError(f"reduce={reduce!r}, but is one of {get_args(Reduce)}")
    if not (0 <= clip_low < 1 and clip_high >= 0):
        raise CorrectionError(
            f"clip_low={clip_low:g} and clip_high={clip_high:g}, but they are distances from "
            "1: 0.2 and 0.28 clip to 0.8 and 1.28"
        )


def _reduced(
    token_loss: Tensor,
    mask: Tensor,
    reduce: Reduce,
    denominator: Denominator | Tensor | float | None,
) -> Tensor:
    terms, counts = token_loss, mask
    if reduce == "sequence-mean":
        terms, counts = row_mean(token_loss, mask), mask.any(-1, keepdim=True)
    if denominator is None:
        return mean(terms, counts)
    by = denominator.terms if isinstance(denominator, Denominator) else denominator
    number = torch.as_tensor(by, dtype=torch.float32, device=token_loss.device)
    # 0 where nothing is counted anywhere, and then so is the sum.
    return torch.where(counts, terms, 0.0).sum() / torch.where(number > 0, number, 1.0)


def _spread(advantages: Tensor, mask: Tensor) -> Tensor:
    """As `[B, T]`."""
    columns = advantages[:, None] if advantages.dim() == 1 else advantages
    if columns.dim() != 2 or columns.shape[0] != mask.shape[0]:
        raise CorrectionError(
            f"advantages have shape {tuple(advantages.shape)} and the mask {tuple(mask.shape)}. "
            "Give [B, T], or [B] or [B, 1] for one a sequence."
        )
    return columns if columns.shape[1] != 1 else columns.expand(-1, mask.shape[-1])
