"""What trainers send, one step after the other."""

from __future__ import annotations

import torch
from hypothesis import settings
from torch import Tensor

# How many steps a test follows: 100 under `--hypothesis-profile long`.
STEPS = settings().max_examples // 10 if settings().max_examples >= 1000 else 3


def stepped(weights: dict[str, Tensor], seed: int = 0) -> dict[str, Tensor]:
    """One step of a trainer: every weight moves, by about a part in a thousand."""
    dice = torch.Generator().manual_seed(seed)
    return {
        name: (t.float() * (1 + 1e-3 * torch.randn(t.shape, generator=dice))).to(t.dtype)
        for name, t in weights.items()
    }
