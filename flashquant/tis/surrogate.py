"""The policy-gradient loss of PPO and DAPO, with the correction in its right place.

    ratio  = pi / pi_old                              what PPO clips: steps since old_logprobs
    weight = pi_old / pi_rollout, bounded             what the correction gives: fp8 against bf16
    loss   = -mean(weight * min(ratio * A, clip(ratio) * A))

The weight stands outside of the clip and carries no gradient: gradients flow through pi alone.

The two ratios share pi_old, and may not overlap. Without a recomputed `old_logprobs`, PPO's ratio
is pi / pi_rollout: it then contains the correction, and a weight beside it would count the same
mismatch twice. So `old_logprobs=None` says just that (verl calls it bypass mode): nothing is
multiplied, and what the correction would reject is still rejected.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal, get_args

import torch
from torch import Tensor

from flashquant.errors import CorrectionError
from flashquant.tis.correction import Correction
from flashquant.tis.metrics import Metrics
from flashquant.tis.ratios import checked_mask, exponential, log_ratios, mean, row_mean

Reduce = Literal["token-mean", "sequence-mean"]


@dataclass(frozen=True)
class LossMetrics:
    """0-d float32 tensors, detached.

    Attributes:
        correction: those of the correction; in bypass mode, of pi against pi_rollout.
        clip_fraction: kept tokens at which PPO's clip was in force.
        policy_k1: mean of -log ratio over kept tokens: how far pi has moved from what PPO compares
            it with.

    """

    correction: Metrics
    clip_fraction: Tensor
    policy_k1: Tensor

    def to_dict(self, prefix: str = "") -> dict[str, Tensor]:
        """All of them by name, for a logger."""
        return self.correction.to_dict(prefix) | {
            f"{prefix}clip_fraction": self.clip_fraction,
            f"{prefix}policy_k1": self.policy_k1,
        }


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
    reduce: Reduce = "token-mean",
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
        reduce: "token-mean" counts every kept token of this batch alike (DAPO); "sequence-mean"
            every sequence that has one (the mean over its tokens). Both are means over the batch
            that is given: micro-batches are for the caller to weigh.

    Raises:
        CorrectionError: a value of an unmasked token is not finite, shapes differ, or
            `old_logprobs` is `rollout_logprobs` itself.

    """
    if old_logprobs is rollout_logprobs:
        raise CorrectionError(
            "old_logprobs is rollout_logprobs itself, so PPO's ratio contains the correction "
            "already, and this one would see no difference. Give old_logprobs=None."
        )
    _check_options(clip_low, clip_high, reduce)
    advantages = _spread(advantages.detach(), mask)
    unmasked = checked_mask(mask, logprobs=logprobs, advantages=advantages)
    bypass = old_logprobs is None
    trainer = logprobs.detach() if old_logprobs is None else old_logprobs.detach()
    weights, keep_mask, metrics = correction(trainer, rollout_logprobs, mask)
    if bypass:
        weights = (weights > 0).float()
    anchor = rollout_logprobs.detach() if bypass else trainer
    log_ratio = log_ratios(logprobs, anchor, unmasked)
    ratio = exponential(log_ratio, correction.safety_bound)
    gain = torch.where(unmasked, advantages.float(), 0.0)
    free, clipped = ratio * gain, ratio.clamp(1 - clip_low, 1 + clip_high) * gain
    token_loss = -weights * torch.minimum(free, clipped)
    with torch.no_grad():
        found = LossMetrics(
            correction=metrics,
            clip_fraction=mean((clipped < free).float(), keep_mask),
            policy_k1=mean(-log_ratio, keep_mask),
        )
    return _reduced(token_loss, keep_mask, reduce), found


def _check_options(clip_low: float, clip_high: float, reduce: str) -> None:
    if reduce not in get_args(Reduce):
        raise CorrectionError(f"reduce={reduce!r}, but is one of {get_args(Reduce)}")
    if not (0 <= clip_low < 1 and clip_high >= 0):
        raise CorrectionError(
            f"clip_low={clip_low:g} and clip_high={clip_high:g}, but they are distances from "
            "1: 0.2 and 0.28 clip to 0.8 and 1.28"
        )


def _reduced(token_loss: Tensor, mask: Tensor, reduce: Reduce) -> Tensor:
    if reduce == "token-mean":
        return mean(token_loss, mask)
    return mean(row_mean(token_loss, mask), mask.any(-1, keepdim=True))


def _spread(advantages: Tensor, mask: Tensor) -> Tensor:
    """As `[B, T]`."""
    columns = advantages[:, None] if advantages.dim() == 1 else advantages
    if columns.dim() != 2 or columns.shape[0] != mask.shape[0]:
        raise CorrectionError(
            f"advantages have shape {tuple(advantages.shape)} and the mask {tuple(mask.shape)}. "
            "Give [B, T], or [B] or [B, 1] for one a sequence."
        )
    return columns if columns.shape[1] != 1 else columns.expand(-1, mask.shape[-1])
