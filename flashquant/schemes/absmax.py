"""Absolute maxima in one pass over the tensor, in its own precision."""

from __future__ import annotations

import torch
from torch import Tensor


def row_absmax(weight: Tensor) -> Tensor:
    """The absolute maximum of each row of `[N, K]`, as float32 `[N, 1]`.

    NaN and Inf come through: a row that holds one has it as its maximum.
    """
    low, high = torch.aminmax(weight, dim=-1, keepdim=True)
    return torch.maximum(low.neg(), high).float().abs()  # no zero with a sign


def absmax(tensor: Tensor) -> Tensor:
    """The absolute maximum of all elements, as a float32 scalar; 0 for an empty tensor."""
    if tensor.numel() == 0:
        return torch.zeros((), dtype=torch.float32, device=tensor.device)
    low, high = torch.aminmax(tensor)
    return torch.maximum(low.neg(), high).float().abs()  # no zero with a sign
