"""The correction that a loss needs when the rollouts came from a slightly different policy.

The engine samples in fp8 or int8, the trainer differentiates in bf16. What the difference
does to the gradient is put right by the ratio of the two, bounded; here is that ratio in all
the forms in use, with its metrics, and the policy loss with the ratio in its right place.

    weights, keep_mask, metrics = truncated_importance_weights(trainer, rollout, mask, cap=2.0)
    value, metrics = loss(logprobs, ..., correction=from_verl(rollout_is="token"))

Log-probs are `[B, T]`, one sequence a row, of the tokens that were sampled, under the distribution
that they were sampled from: where temperature, top-p or top-k is set, ask vLLM for
`logprobs_mode="processed_logprobs"`. What no weight can mend has a remedy of its own: top-p and
top-k `masked_logprobs`, experts chosen differently `replay_routing`; `report` says which it is.
Pure torch, no engine: it runs in the trainer.
"""

from __future__ import annotations

from torch import Tensor

from flashquant.tis.correction import Corrected, Correction, Level, icepop, masked
from flashquant.tis.metrics import Metrics
from flashquant.tis.mismatch import Report, report
from flashquant.tis.rejection import Rejection
from flashquant.tis.routing import replay_routing
from flashquant.tis.sampling import Truncation, masked_logprobs
from flashquant.tis.stacks import (
    from_flashrl,
    from_ms_swift,
    from_nemo_rl,
    from_openrlhf,
    from_skyrl,
    from_trl,
    from_verl,
)
from flashquant.tis.successors import effective_sample_size, from_areal, step_scale, trm
from flashquant.tis.surrogate import LossMetrics, loss
from flashquant.tis.totals import Denominator
from flashquant.tis.trust import DPPO

__all__ = [
    "DPPO",
    "Corrected",
    "Correction",
    "Denominator",
    "LossMetrics",
    "Metrics",
    "Rejection",
    "Report",
    "Truncation",
    "effective_sample_size",
    "from_areal",
    "from_flashrl",
    "from_ms_swift",
    "from_nemo_rl",
    "from_openrlhf",
    "from_skyrl",
    "from_trl",
    "from_verl",
    "icepop",
    "loss",
    "masked",
    "masked_logprobs",
    "replay_routing",
    "report",
    "step_scale",
    "trm",
    "truncated_importance_weights",
]


def truncated_importance_weights(
    trainer_logprobs: Tensor,
    rollout_logprobs: Tensor,
    mask: Tensor,
    *,
    cap: float = 2.0,
    level: Level = "token",
) -> Corrected:
    """min(pi_trainer / pi_rollout, cap): FlashRL's formula, and nothing else.

    Multiply the weights into the loss of each token, behind PPO's own clip.

    Args:
        trainer_logprobs: `[B, T]`, recomputed by the trainer with the weights the engine had.
        rollout_logprobs: `[B, T]`, as the engine returned them.
        mask: `[B, T]`, True on the tokens that the policy chose: no prompt, tool output, padding.
        cap: the largest weight.
        level: a ratio for each "token", one for each "sequence", or its "geometric" mean.

    Raises:
        CorrectionError: a log-prob of an unmasked token is not finite, or shapes differ.

    """
    return Correction(level=level, cap=cap)(trainer_logprobs, rollout_logprobs, mask)
