"""Log ratios of two policies, on the tokens that count and nowhere else.

The mask comes before every exponential. A tool's or a prompt's token was sampled by neither
policy; what stands at its place may be anything, NaN included, and must reach neither a value
nor a gradient: exp(inf) * 0 would be NaN in both.
"""

from __future__ import annotations

import torch
from torch import Tensor

from flashquant.errors import CorrectionError


def log_ratios(numerator: Tensor, denominator: Tensor, mask: Tensor) -> Tensor:
    """numerator - denominator in float32 where the mask is True; elsewhere 0, and no gradient."""
    return torch.where(mask, numerator.float() - denominator.float(), 0.0)


def exponential(log_ratio: Tensor, bound: float) -> Tensor:
    """exp of what lies within the safety bound: always finite, and never 0."""
    return log_ratio.clamp(-bound, bound).exp()


def row_sum(values: Tensor, mask: Tensor) -> Tensor:
    """`[B, 1]`; 0 for a row without unmasked tokens."""
    return torch.where(mask, values, 0.0).sum(-1, keepdim=True)


def row_mean(values: Tensor, mask: Tensor) -> Tensor:
    """`[B, 1]`; 0 for a row without unmasked tokens."""
    return row_sum(values, mask) / mask.sum(-1, keepdim=True).clamp(min=1)


def mean(values: Tensor, mask: Tensor) -> Tensor:
    """0-d; 0 where nothing is unmasked."""
    return torch.where(mask, values, 0.0).sum() / mask.sum().clamp(min=1)


def checked_mask(mask: Tensor, **logprobs: Tensor) -> Tensor:
    """The mask as bool, once everything beside it has its shape and is finite under it.

    One wait for the device, however many tensors are looked at.
    """
    for name, values in logprobs.items():
        _check_shape(name, values, mask)
    unmasked = mask.bool()
    wrong = torch.stack(
        [(mask != unmasked).any(), *((~v.isfinite() & unmasked).any() for v in logprobs.values())]
    )
    if bool(wrong.any()):
        _refuse(mask, unmasked, logprobs)
    return unmasked


def _check_shape(name: str, values: Tensor, mask: Tensor) -> None:
    if values.dim() != 2:
        raise CorrectionError(
            f"{name} has shape {tuple(values.shape)}, but is [B, T], one sequence a row. Unpack "
            "what is packed, and give a single sequence as values[None]."
        )
    if values.shape != mask.shape:
        raise CorrectionError(
            f"{name} has shape {tuple(values.shape)} and the mask {tuple(mask.shape)}. Give both "
            "the same: log-probs and mask of the same tokens."
        )
    if not values.is_floating_point():
        raise CorrectionError(f"{name} is {values.dtype}, but log-probs are floating point")


def _refuse(mask: Tensor, unmasked: Tensor, logprobs: dict[str, Tensor]) -> None:
    if bool((mask != unmasked).any()):
        raise CorrectionError(
            "the mask has values other than 0 and 1. It says which tokens count; put what a token "
            "weighs into its advantage."
        )
    for name, values in logprobs.items():
        where = (~values.isfinite() & unmasked).nonzero()
        if len(where):
            row, column = where[0].tolist()
            raise CorrectionError(
                f"{name}[{row}, {column}] is {values[row, column].item()}, and {len(where)} of "
                f"{int(unmasked.sum())} unmasked tokens are not finite. Mask what the policy did "
                "not choose; what it did choose had a probability, so look at who computed it."
            )
