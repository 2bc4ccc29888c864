"""Symmetric int8 with one scale an output channel (a row of the weight)."""

from __future__ import annotations

import torch
from torch import Tensor

from flashquant.schemes.absmax import row_absmax
from flashquant.schemes.chunks import row_chunks

_INT8_MAX = 127.0


def int8_channel(weight: Tensor, codes: Tensor | None = None) -> tuple[Tensor, Tensor]:
    """Quantize each row to its own absolute maximum.

    scale = absmax / 127, code = round_half_even(weight * (127 / absmax)), in
    float32. A row of zeros has codes 0 and scale 1/127; so has one whose numbers are
    all so small (below 3.73e-37) that 127 / absmax overflows.

    Args:
        weight: `[N, K]`, bf16, fp16 or fp32; read in its own precision.
        codes: `[N, K]`, where they are to be written; new memory if not given.

    Returns:
        codes `[N, K]` int8 in [-127, 127] and scales `[N, 1]` float32.

    """
    if codes is None:
        codes = torch.empty(weight.shape, dtype=torch.int8, device=weight.device)
    scales = torch.empty((weight.shape[0], 1), dtype=torch.float32, device=weight.device)
    # A 0-d tensor is divided; a Python number would be multiplied by a reciprocal.
    largest = torch.tensor(_INT8_MAX, dtype=torch.float32, device=weight.device)
    for rows in row_chunks(weight):
        peak = row_absmax(weight[rows])
        peak = torch.where((largest / peak).isinf(), 1.0, peak)
        scales[rows] = peak / largest
        # float32 times bf16 is float32; the product rounds to 127 at most.
        codes[rows] = (weight[rows] * (largest / peak)).round_()
    return codes, scales
