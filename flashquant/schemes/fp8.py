"""float8 e4m3: one scale an output channel, or one a tensor."""

from __future__ import annotations

import torch
from torch import Tensor

from flashquant.schemes.absmax import absmax, row_absmax
from flashquant.schemes.chunks import row_chunks

FP8 = torch.float8_e4m3fn
_FP8_MAX = torch.finfo(FP8).max
# vLLM keeps a channel's scale above this, so that dividing by it stays finite
# (quantization/online/fp8.py and its dynamic per-token kernel).
SMALLEST_CHANNEL_SCALE = 1.0 / (_FP8_MAX * 512)


def fp8_channel(weight: Tensor, codes: Tensor | None = None) -> tuple[Tensor, Tensor]:
    """Quantize each row to its own absolute maximum.

    scale = max(absmax / 448, 1 / (448 * 512)), code = e4m3(clamp(weight / scale)),
    with a true division in float32: bit for bit what vLLM's online
    `fp8_per_channel` stores (quantization/online/fp8.py).

    Args:
        weight: `[N, K]`, bf16, fp16 or fp32.
        codes: `[N, K]`, where they are to be written; new memory if not given.

    Returns:
        codes `[N, K]` float8_e4m3fn and scales `[N, 1]` float32.

    """
    if codes is None:
        codes = torch.empty(weight.shape, dtype=FP8, device=weight.device)
    scales = torch.empty((weight.shape[0], 1), dtype=torch.float32, device=weight.device)
    # A 0-d divisor is divided by; a Python number would be turned into a reciprocal.
    largest = _largest(weight.device)
    for rows in row_chunks(weight):
        scales[rows] = (row_absmax(weight[rows]) / largest).clamp_min(SMALLEST_CHANNEL_SCALE)
        codes[rows] = (weight[rows] / scales[rows]).clamp_(-_FP8_MAX, _FP8_MAX)
    return codes, scales


def fp8_tensor(weight: Tensor, codes: Tensor | None = None) -> tuple[Tensor, Tensor]:
    """Quantize a whole tensor to its absolute maximum.

    scale = absmax / 448; codes as `fp8_static`: what vLLM's online
    `fp8_per_tensor` stores (quantization/online/fp8.py).

    Args:
        weight: `[N, K]`, bf16, fp16 or fp32. All zeros give scale 0 and codes of 448.

    Returns:
        codes of the same shape, float8_e4m3fn, and scale `[1]` float32.

    """
    scale = tensor_scale(absmax(weight))
    return fp8_static(weight, scale, codes), scale


def fp8_tensor_rows(weight: Tensor, codes: Tensor | None = None) -> tuple[Tensor, Tensor]:
    """`fp8_tensor`, with its scale filled into one a row: for kernels that read a scale a channel.

    What FlashRL's `fp8_tensor` sends (flash_quantization.py): vLLM's dynamic per-tensor kernel on a
    tensor of the checkpoint, before it is fused or cut up, and its scale in every row.

    Args:
        weight: `[N, K]`, bf16, fp16 or fp32.
        codes: `[N, K]`, where they are to be written; new memory if not given.

    Returns:
        codes `[N, K]` float8_e4m3fn and scales `[N, 1]` float32, all alike.

    """
    made, scale = fp8_tensor(weight, codes)
    return made, filled(scale, weight)


def filled(scales: Tensor, weight: Tensor) -> Tensor:
    """The scale of each matrix `[N, K]` of a weight, `[1]` or `[E]`, in each of its rows."""
    per_matrix = scales.view(*weight.shape[:-2], 1, 1)
    return per_matrix.expand(*weight.shape[:-1], 1).contiguous()


def fp8_tensors(weight: Tensor, count: int, codes: Tensor | None = None) -> tuple[Tensor, Tensor]:
    """Quantize matrices that lie one below the other, each as `fp8_tensor` does.

    Args:
        weight: `[count * N, K]`, bf16, fp16 or fp32.
        count: how many there are.
        codes: of the same shape, where they are to be written; new memory if not given.

    Returns:
        codes `[count * N, K]` float8_e4m3fn and scales `[count]` float32.

    """
    if codes is None:
        codes = torch.empty(weight.shape, dtype=FP8, device=weight.device)
    parts = zip(weight.tensor_split(count), codes.tensor_split(count), strict=True)
    return codes, torch.cat([fp8_tensor(one, into)[1] for one, into in parts])


def tensor_scale(peak: Tensor) -> Tensor:
    """The scale `[1]` of a tensor with this absolute maximum, float32."""
    return peak.reshape(1).float() / _largest(peak.device)


def _largest(device: torch.device) -> Tensor:
    """448, filled in there: a copy from the host would wait for the device."""
    return torch.full((), _FP8_MAX, dtype=torch.float32, device=device)


def fp8_static(tensor: Tensor, scale: Tensor, codes: Tensor | None = None) -> Tensor:
    """e4m3(max(-448, min(tensor * (1 / scale), 448))): a given scale, multiplied by its reciprocal.

    min(NaN, 448) is 448, as C has it. So zeros under the scale 0, whose reciprocal is infinite,
    become 448, which times 0 is what they were.

    The reciprocal is what vLLM's static kernel multiplies by
    (csrc/quantization/w8a8/fp8/common.cu), and a multiplication rounds some
    values differently from a division.

    Args:
        tensor: `[N, K]`, bf16, fp16 or fp32.
        scale: float32, broadcastable to `[N, K]`.

    """
    if codes is None:
        codes = torch.empty(tensor.shape, dtype=FP8, device=tensor.device)
    inverse = reciprocal(scale)
    per_row = inverse.dim() == 2 and inverse.shape[0] == tensor.shape[0]
    for rows in row_chunks(tensor):
        factor = inverse[rows] if per_row else inverse
        codes[rows] = (tensor[rows] * factor).nan_to_num_(_FP8_MAX).clamp_(-_FP8_MAX, _FP8_MAX)
    return codes


def reciprocal(scale: Tensor) -> Tensor:
    """1 / scale, at least 1-d: a 0-d float32 factor would leave a product in bf16.

    Infinite where the scale is 0, or so small that the quotient overflows.
    """
    return (scale.reshape(1) if scale.dim() == 0 else scale).reciprocal()
