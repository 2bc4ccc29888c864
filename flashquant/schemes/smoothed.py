"""int8 through a profile: a row and a column factor, then codes.

    w'  = (weight * output_scale) * input_scale      float32, in this order

A code of the checkpoint stands for itself times the row's weight scale, so w' is the
smoothed weight counted in the scales of the checkpoint. Floats do not associate: another
order of the two products changes about one code in 100,000.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn.functional import hardshrink

from flashquant.schemes.chunks import row_chunks
from flashquant.schemes.int4 import int4_group
from flashquant.schemes.int8 import int8_channel

# A scale of absmax / 127.5 puts the maximum of each row between two codes: that is no clipping.
HELD = 128.5


class Frozen(NamedTuple):
    """Codes under scales that stay as they are, and how well they hold the weight.

    Attributes:
        codes: `[N, K]` int8.
        clipped: how many weights were clipped by a code or more; a scalar on the device.
        peak: max |w'| / 127; a scalar on the device. 1 is a scale that fits.

    """

    codes: Tensor
    clipped: Tensor
    peak: Tensor


def scaled(weight: Tensor, input_scale: Tensor | None, output_scale: Tensor | None) -> Tensor:
    """(weight * output_scale) * input_scale, in float32; None means ones.

    Args:
        weight: `[N, K]`, or a norm `[K]`; bf16, fp16 or fp32.
        input_scale: `[K]` float32.
        output_scale: `[N]` float32.

    """
    product = weight.float() if output_scale is None else weight * output_scale.unsqueeze(-1)
    return product if input_scale is None else product * input_scale


def scaled_norm(weight: Tensor, input_scale: Tensor | None, offset: float) -> Tensor:
    """The weight `[K]` of a norm that multiplies by `offset + weight`, in float32."""
    if not offset:
        return scaled(weight, input_scale, None)
    return scaled(weight.float() + offset, input_scale, None) - offset


def int8_frozen(
    weight: Tensor,
    input_scale: Tensor | None,
    output_scale: Tensor | None,
    codes: Tensor | None = None,
) -> Frozen:
    """The codes of a weight under scales that stay as they are: FlashRL's arithmetic.

    code = clamp(round_half_even(w'), -128, 127).
    """
    if codes is None:
        codes = torch.empty(weight.shape, dtype=torch.int8, device=weight.device)
    clipped = torch.zeros((), dtype=torch.int64, device=weight.device)
    peak = torch.zeros((), dtype=torch.float32, device=weight.device)
    for rows in row_chunks(weight):
        factor = None if output_scale is None else output_scale[rows]
        smoothed = scaled(weight[rows], input_scale, factor)
        low, high = torch.aminmax(smoothed)
        furthest = torch.maximum(-low, high)
        peak = torch.maximum(peak, furthest)
        # Mostly nothing is clipped. Another device would have to be waited for to know.
        if weight.device.type != "cpu" or furthest > HELD:
            clipped += hardshrink(smoothed, HELD).count_nonzero()
        codes[rows] = smoothed.round_().clamp_(-128, 127)
    return Frozen(codes, clipped, peak / 127)


def int8_refreshed(
    weight: Tensor,
    input_scale: Tensor | None,
    output_scale: Tensor | None,
    weight_scale: Tensor,
    codes: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """The codes of a weight under scales that fit it: `int8_channel` of the smoothed weight.

    Args:
        weight: `[N, K]`.
        input_scale: `[K]` float32.
        output_scale: `[N]` float32.
        weight_scale: `[N, 1]`, of the checkpoint.
        codes: `[N, K]`, where they are to be written; new memory if not given.

    Returns:
        codes `[N, K]` in [-127, 127] and scales `[N, 1]` float32: `weight_scale` times the
        scale of w'. A row of zeros has codes 0.

    """
    if codes is None:
        codes = torch.empty(weight.shape, dtype=torch.int8, device=weight.device)
    scales = torch.empty((weight.shape[0], 1), dtype=torch.float32, device=weight.device)
    for rows in row_chunks(weight):
        factor = None if output_scale is None else output_scale[rows]
        codes[rows], counted = int8_channel(scaled(weight[rows], input_scale, factor))
        scales[rows] = weight_scale[rows] * counted
    return codes, scales


def int4_refreshed(
    weight: Tensor,
    input_scale: Tensor | None,
    output_scale: Tensor | None,
    held: Tensor,
    codes: Tensor | None = None,
    *,
    group: int,
) -> tuple[Tensor, Tensor]:
    """`int4_group` of the smoothed weight w'.

    Args:
        weight: `[N, K]`.
        input_scale: `[K]` float32.
        output_scale: `[N]` float32.
        held: `[N, K / group]` uint8, hundredths of each group's absolute maximum that codes reach.
        codes: `[N, K]`, where they are to be written; new memory if not given.
        group: how many columns share a scale; -1 for a whole row.

    Returns:
        codes `[N, K]` int8 in [-8, 7] and scales `[N, K / group]` bfloat16.

    """
    if codes is None:
        codes = torch.empty(weight.shape, dtype=torch.int8, device=weight.device)
    scales = torch.empty(held.shape, dtype=torch.bfloat16, device=weight.device)
    hundred = torch.tensor(100.0, device=weight.device)
    for rows in row_chunks(weight):
        factor = None if output_scale is None else output_scale[rows]
        smoothed = scaled(weight[rows], input_scale, factor)
        codes[rows], scales[rows] = int4_group(
            smoothed, group=group, held=held[rows].float() / hundred
        )
    return codes, scales
