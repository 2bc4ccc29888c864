"""NVFP4: codes of four bits (e2m1), a scale in e4m3 for 16 of them, and one divisor for all.

A code stands for `e2m1 * scale / divisor`. The divisor is there because e4m3 has no exponents to
spare: it moves the scales of a whole layer to where e4m3 is fine.
"""

from __future__ import annotations

import torch
from torch import Tensor

from flashquant.schemes.absmax import absmax, row_absmax
from flashquant.schemes.chunks import row_chunks

GROUP = 16
_E4M3 = torch.float8_e4m3fn
_LARGEST_SCALE = torch.finfo(_E4M3).max  # 448
_SMALLEST_SCALE = torch.finfo(_E4M3).eps  # 0.125, where a scale would be zero
_LARGEST_CODE = 6.0
# Half-way between neighbours of 0, 0.5, 1, 1.5, 2, 3, 4, 6. Of two that are as near, the one with
# the even code is taken, so every second boundary belongs to the larger one.
_BOUNDARIES = (0.25, 0.75, 1.25, 1.75, 2.5, 3.5, 5.0)
_SIGN = 8


def nvfp4_matrix(weight: Tensor, peak: Tensor | None = None) -> tuple[Tensor, Tensor, Tensor]:
    """Quantize groups of 16 columns, each to its own scale under one divisor.

    divisor = (1 / peak) * 2688 (which is 448 * 6), scale = e4m3(min(divisor * (absmax / 6), 448)),
    code = e2m1(weight / (scale / divisor)), rounded to nearest, ties to even, in float32:
    `generate_gparam`, `calculate_qparams` and `_quantize` of compressed-tensors, whose checkpoints
    hold the same three. A scale that would be zero is 0.125, and a divisor that
    would be infinite is 1, as there.

    Args:
        weight: `[N, K]`, bf16, fp16 or fp32; K is a multiple of 16.
        peak: the absolute maximum of everything that shares the divisor, one float32; that of the
            weight if not given.

    Returns:
        codes `[N, K / 2]` uint8, two in a byte, the first one in its lower half; scales
        `[N, K / 16]` e4m3; and the divisor `[1]` float32.

    Raises:
        ValueError: K is no multiple of 16.

    """
    rows, columns = weight.shape
    if columns % GROUP:
        raise ValueError(f"{columns} columns are no multiple of groups of {GROUP}")
    device = weight.device
    divisor = _divisor(absmax(weight) if peak is None else peak)
    codes = torch.empty(rows, columns // 2, dtype=torch.uint8, device=device)
    scales = torch.empty(rows, columns // GROUP, dtype=_E4M3, device=device)
    for some in row_chunks(weight):
        groups = weight[some].reshape(-1, GROUP)
        top = row_absmax(groups) / torch.tensor(_LARGEST_CODE, dtype=torch.float32, device=device)
        scale = (divisor * top).clamp_(max=_LARGEST_SCALE).to(_E4M3)
        scale = torch.where(scale.float() == 0, _SMALLEST_SCALE, scale.float())
        scales[some] = scale.to(_E4M3).view(-1, columns // GROUP)
        codes[some] = _packed(groups / (scale / divisor)).view(-1, columns // 2)
    return codes, scales, divisor


def _divisor(peak: Tensor) -> Tensor:
    divisor = peak.float().reciprocal().reshape(1) * (_LARGEST_SCALE * _LARGEST_CODE)
    return torch.where(divisor.isinf(), 1.0, divisor)


def _packed(scaled: Tensor) -> Tensor:
    """The nearest codes of `[M, K]`, two in a byte: `[M, K / 2]` uint8."""
    # vLLM's default dtype is that of the model while it loads one.
    bounds = torch.tensor(_BOUNDARIES, dtype=torch.float32, device=scaled.device)
    # `bucketize` counts the boundaries below a number; one that belongs to the larger code moves.
    bounds[1::2] = torch.nextafter(bounds[1::2], torch.zeros_like(bounds[1::2]))
    codes = torch.bucketize(scaled.abs(), bounds, out_int32=True).to(torch.uint8)
    codes |= scaled.signbit().to(torch.uint8) * _SIGN
    return codes[:, ::2] | codes[:, 1::2] << 4
