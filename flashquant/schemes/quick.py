"""The same functions as their definitions, by the fastest road that this tensor can take."""

from __future__ import annotations

import torch
from torch import Tensor

from flashquant.schemes import absmax as maxima
from flashquant.schemes import fp8, int8, native, smoothed
from flashquant.schemes.smoothed import Frozen


def row_absmax(weight: Tensor) -> Tensor:
    """`absmax.row_absmax`."""
    kernels = _kernels(weight)
    return maxima.row_absmax(weight) if kernels is None else kernels.row_absmax(weight)


def absmax(tensor: Tensor) -> Tensor:
    """`absmax.absmax`."""
    if tensor.numel() and tensor.is_contiguous():
        rows = tensor.view(-1, tensor.shape[-1]) if tensor.dim() else tensor.view(1, 1)
        if (kernels := _kernels(rows)) is not None:
            return kernels.row_absmax(rows).max()
    return maxima.absmax(tensor)


def int8_channel(weight: Tensor, codes: Tensor | None = None) -> tuple[Tensor, Tensor]:
    """`int8.int8_channel`."""
    kernels = _kernels(weight)
    return (int8 if kernels is None else kernels).int8_channel(weight, codes)


def fp8_channel(weight: Tensor, codes: Tensor | None = None) -> tuple[Tensor, Tensor]:
    """`fp8.fp8_channel`."""
    kernels = _kernels(weight)
    return (fp8 if kernels is None else kernels).fp8_channel(weight, codes)


def fp8_tensor(weight: Tensor, codes: Tensor | None = None) -> tuple[Tensor, Tensor]:
    """`fp8.fp8_tensor`."""
    kernels = _kernels(weight)
    return (fp8 if kernels is None else kernels).fp8_tensor(weight, codes)


def fp8_static(tensor: Tensor, scale: Tensor, codes: Tensor | None = None) -> Tensor:
    """`fp8.fp8_static`."""
    kernels = _kernels(tensor)
    return (fp8 if kernels is None else kernels).fp8_static(tensor, scale, codes)


def int8_frozen(
    weight: Tensor,
    input_scale: Tensor | None,
    output_scale: Tensor | None,
    codes: Tensor | None = None,
) -> Frozen:
    """`smoothed.int8_frozen`."""
    kernels = _kernels(weight)
    made_by = smoothed if kernels is None else kernels
    return made_by.int8_frozen(weight, input_scale, output_scale, codes)


def int8_refreshed(
    weight: Tensor,
    input_scale: Tensor | None,
    output_scale: Tensor | None,
    weight_scale: Tensor,
    codes: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """`smoothed.int8_refreshed`."""
    kernels = _kernels(weight)
    made_by = smoothed if kernels is None else kernels
    return made_by.int8_refreshed(weight, input_scale, output_scale, weight_scale, codes)


def _kernels(weight: Tensor) -> native.Kernels | None:
    """Those that take this tensor: it has memory, and nobody watches what is done to it."""
    plain = type(weight).__torch_dispatch__ is Tensor.__torch_dispatch__
    if not plain or not native.Kernels.take(weight) or torch.compiler.is_compiling():
        return None
    return native.kernels()
