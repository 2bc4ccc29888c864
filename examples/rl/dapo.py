"""DAPO's batch: advantages within a group, groups that teach nothing dropped, tensors padded.

The loss itself is `flashquant.tis.loss`: clip-higher, a mean over tokens, no KL term.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from examples.rl import task
from examples.rl.rollout import Episode

_SMALLEST_DEVIATION = 1e-6


@dataclass(frozen=True)
class Batch:
    """What one step learns from; all but `tokens` are about its columns from the second on.

    Attributes:
        tokens: `[B, T]`, prompt and answer, padded on the right.
        mask: `[B, T - 1]`, True on the tokens that the policy chose.
        rollout_logprobs: `[B, T - 1]`, 0 where the mask is False.
        advantages: `[B]`.

    """

    tokens: Tensor
    mask: Tensor
    rollout_logprobs: Tensor
    advantages: Tensor


def advantages(rewards: Tensor) -> Tensor:
    """`[P, G]` rewards of G answers to each of P prompts: each against its group.

    0 in a group without a difference: it says nothing about what is better.
    """
    deviation = rewards.std(dim=1, keepdim=True, correction=0)
    centred = rewards - rewards.mean(dim=1, keepdim=True)
    return torch.where(deviation > _SMALLEST_DEVIATION, centred / deviation.clamp(min=1e-6), 0.0)


def batch(episodes: list[Episode], group: int) -> Batch | None:
    """The groups in which some answers are right and some wrong; None where there is none."""
    rewards = torch.tensor([episode.reward for episode in episodes]).view(-1, group)
    gains = advantages(rewards).view(-1)
    kept = (gains.view(-1, group) != 0).any(dim=1).repeat_interleave(group)
    if not kept.any():
        return None
    teaching = [episode for episode, keep in zip(episodes, kept.tolist(), strict=True) if keep]
    return _padded(teaching, gains[kept])


def _padded(episodes: list[Episode], gains: Tensor) -> Batch:
    longest = task.PROMPT_LENGTH + max(len(episode.tokens) for episode in episodes)
    tokens = torch.full((len(episodes), longest), task.PADDING)
    mask = torch.zeros(len(episodes), longest, dtype=torch.bool)
    logprobs = torch.zeros(len(episodes), longest)
    for row, episode in enumerate(episodes):
        end = task.PROMPT_LENGTH + len(episode.tokens)
        answer = slice(task.PROMPT_LENGTH, end)
        ids = task.encode(episode.problem.prompt) + episode.tokens
        tokens[row, :end] = torch.tensor(ids)
        mask[row, answer] = torch.tensor(episode.chosen)
        logprobs[row, answer] = torch.tensor(episode.logprobs)
    return Batch(tokens, mask[:, 1:], logprobs[:, 1:], gains)
