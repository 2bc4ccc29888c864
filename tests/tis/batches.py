"""Batches for the tests: by hand, and by hypothesis."""

from __future__ import annotations

import math

import torch
from hypothesis import strategies as st
from torch import Tensor

from tests.tis.derived import Batch

# Steps of 1/8 are exact in bf16 here, and so are their sums in float32: no test turns on a rounding
# at a bound.
_STEP = 8
_near = st.integers(-12, 12)
_far = st.integers(-30 * _STEP, 30 * _STEP)


@st.composite
def batches(draw, *, near: bool = False) -> Batch:
    rows, columns = draw(st.integers(1, 4)), draw(st.integers(1, 6))
    apart = _near if near else st.one_of(_near, _near, _far)

    def token():
        rollout = -draw(st.integers(0, 64)) / _STEP
        return (rollout + draw(apart) / _STEP, rollout, draw(st.booleans()))

    return [[token() for _ in range(columns)] for _ in range(rows)]


def tensors(batch: Batch, dtype: torch.dtype = torch.float32) -> tuple[Tensor, Tensor, Tensor]:
    """Trainer's and rollout's log-probs, and the mask."""
    trainer = torch.tensor([[token[0] for token in row] for row in batch], dtype=dtype)
    rollout = torch.tensor([[token[1] for token in row] for row in batch], dtype=dtype)
    return trainer, rollout, torch.tensor([[token[2] for token in row] for row in batch])


def of_ratios(*rows: list[float | None]) -> tuple[Tensor, Tensor, Tensor]:
    """A batch with these ratios; None is a masked token, with NaN and inf at its place."""
    trainer = [[math.log(r / 8) if r else math.nan for r in row] for row in rows]
    rollout = [[math.log(1 / 8) if r else math.inf for r in row] for row in rows]
    mask = [[r is not None for r in row] for row in rows]
    return torch.tensor(trainer), torch.tensor(rollout), torch.tensor(mask)
