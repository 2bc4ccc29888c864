"""DPPO: a trust region in probability, in the place of PPO's clip on the ratio (2602.04879).

    keep = not (moves away with the advantage, and the divergence is above delta)
    loss = -mean(weight * keep * min(ratio, ratio_cap) * A)

A ratio says little of a rare token: from 1e-4 to 1e-2 it is 100, and hardly any probability has
moved. So the divergence is that of two choices, the sampled token or another one:

    binary_tv    |pi - mu|
    binary_kl    mu log(mu / pi) + (1 - mu) log((1 - mu) / (1 - pi))

with mu the policy that pi is compared with: the rollout's in bypass mode, which is the paper's.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Literal, get_args

import torch
from torch import Tensor

from flashquant.errors import CorrectionError
from flashquant.tis.ratios import exponential
from flashquant.tis.rejection import one_of

DPPOType = Literal["binary_tv", "binary_kl"]

_LEAST = 1e-7  # of 1 - p, in float32


@dataclass(frozen=True)
class DPPO:
    """The names are SkyRL's (`trainer.algorithm.dppo`).

    verl's `loss_mode: dppo_tv` has them as `clip_ratio_low`, `clip_ratio_high` and, for
    `ratio_cap`, `clip_ratio_c`, 20 by default; TRL's as `epsilon_low` and `epsilon_high`. The paper
    has 0.2 for TV, 0.05 for KL.

    Attributes:
        dppo_type: how far the policies are apart, see the module.
        delta_low: the largest divergence of a token whose advantage is negative, and which has
            become less likely already.
        delta_high: the same where it is positive, and the token more likely already.
        ratio_cap: the ratio that multiplies the advantage is at most this, without ending the
            gradient. None: the safety bound alone.

    """

    dppo_type: DPPOType = "binary_tv"
    delta_low: float = 0.2
    delta_high: float = 0.2
    ratio_cap: float | None = None

    def __post_init__(self) -> None:
        """Refuse what is no distance.

        Raises:
            CorrectionError: says which.

        """
        one_of("dppo_type", self.dppo_type, get_args(DPPOType))
        for name, value in (("delta_low", self.delta_low), ("delta_high", self.delta_high)):
            if not (value >= 0 and math.isfinite(value)):
                raise CorrectionError(f"{name}={value:g}, but is a divergence: 0 or above")
        if self.ratio_cap is not None and not self.ratio_cap >= 1:
            raise CorrectionError(f"ratio_cap={self.ratio_cap:g}, but is 1 or above, or None")

    def gain(
        self, log_ratio: Tensor, anchor: Tensor, advantages: Tensor, bound: float
    ) -> tuple[Tensor, Tensor]:
        """Of each token what the loss is to raise, and where the trust region holds it back.

        Args:
            log_ratio: `[B, T]` of pi / mu; gradients flow here. 0 where masked.
            anchor: `[B, T]` log-probs of mu; finite everywhere.
            advantages: `[B, T]`.
            bound: the safety bound.

        """
        held = self._held(log_ratio.detach(), anchor, advantages)
        ratio = exponential(log_ratio.detach(), bound)
        if self.ratio_cap is not None:
            ratio = ratio.clamp(max=self.ratio_cap)
        # exp(0), with the gradient of log pi: r grad(log pi) is the gradient of r.
        moving = ratio * (log_ratio - log_ratio.detach()).exp()
        return torch.where(held, 0.0, moving * advantages), held

    def _held(self, log_ratio: Tensor, anchor: Tensor, advantages: Tensor) -> Tensor:
        divergence = self._divergence(anchor.clamp(max=0), (anchor + log_ratio).clamp(max=0))
        up = (advantages > 0) & (log_ratio > 0) & (divergence > self.delta_high)
        return up | ((advantages < 0) & (log_ratio < 0) & (divergence > self.delta_low))

    def _divergence(self, log_mu: Tensor, log_pi: Tensor) -> Tensor:
        mu, pi = log_mu.exp(), log_pi.exp()
        if self.dppo_type == "binary_tv":
            return (pi - mu).abs()
        others_mu, others_pi = (-torch.expm1(p).clamp(max=-_LEAST) for p in (log_mu, log_pi))
        return mu * (log_mu - log_pi) + others_mu * (others_mu / others_pi).log()
