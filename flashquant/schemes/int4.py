"""Symmetric int4, with one scale a group of neighbouring columns of a row.

Codes are int8 here, one byte each: four bits are packed where a kernel wants them.
"""

from __future__ import annotations

import torch
from torch import Tensor

from flashquant.errors import MisfitTensor
from flashquant.schemes.absmax import row_absmax
from flashquant.schemes.chunks import row_chunks

_MIN, _MAX = -8, 7
_HALF_OF_RANGE = 7.5  # -8 and 7 are as far from zero as each other
_TINY = torch.finfo(torch.bfloat16).tiny


def int4_group(
    weight: Tensor, codes: Tensor | None = None, *, group: int, held: Tensor | None = None
) -> tuple[Tensor, Tensor]:
    """Quantize each group of columns to its own absolute maximum, rounded to nearest.

    scale = bf16(held * absmax / 7.5), code = clamp(round_half_even(weight / scale), -8, 7), in
    float32 and by true division: the range of compressed-tensors' symmetric int4
    (`calculate_qparams` in its quantization/utils/helpers.py), whose checkpoints store scales in
    the model's dtype, too. Codes are made by the scale as it is stored. A group of zeros has codes
    0 and scale 1; so has one whose scale would be no normal number (below 1.2e-38).

    Args:
        weight: `[N, K]`, or of several matrices `[E, N, K]`; bf16, fp16 or fp32.
        codes: of the same shape, where they are to be written; new memory if not given.
        group: how many columns share a scale; -1 for a whole row.
        held: `[..., N, K / group]` float32, how much of each group's absolute maximum codes reach;
            what is beyond is clipped. All of it if not given.

    Returns:
        codes `[..., N, K]` int8 in [-8, 7] and scales `[..., N, K / group]` bfloat16.

    Raises:
        ValueError: K is no multiple of `group`.

    """
    columns = weight.shape[-1]
    width = columns if group == -1 else group
    if columns % width:
        raise ValueError(f"{columns} columns are no multiple of groups of {group}")
    if codes is None:
        codes = torch.empty(weight.shape, dtype=torch.int8, device=weight.device)
    form = (*weight.shape[:-1], columns // width)
    scales = torch.empty(form, dtype=torch.bfloat16, device=weight.device)
    groups, into = weight.reshape(-1, form[-1], width), codes.view(-1, form[-1], width)
    for rows in row_chunks(weight.reshape(-1, columns)):
        peak = row_absmax(groups[rows].reshape(-1, width)).view(-1, form[-1], 1)
        if held is not None:
            peak = peak * held.view(-1, form[-1], 1)[rows]
        # A 0-d tensor is divided by; a Python number would be turned into a reciprocal.
        scale = (peak / torch.tensor(_HALF_OF_RANGE, device=weight.device)).bfloat16().float()
        scale = torch.where(scale < _TINY, 1.0, scale)  # NaN stays, for it is not less
        into[rows] = (groups[rows] / scale).round_().clamp_(_MIN, _MAX)
        scales.view(-1, form[-1])[rows] = scale.squeeze(-1)
    return codes, scales


def check_int4(name: str, codes: Tensor) -> None:
    """Refuse codes that four bits do not hold: packing would cut them off.

    Raises:
        MisfitTensor: one of them is below -8 or above 7.

    """
    low, high = (int(end) for end in torch.aminmax(codes)) if codes.numel() else (0, 0)
    if low < _MIN or high > _MAX:
        raise MisfitTensor(
            f"{name} holds codes from {low} to {high}, and the engine serves codes of four bits, "
            f"{_MIN} to {_MAX}. Send the weights as the trainer has them."
        )
