"""The same functions as their definitions, by the fastest road that this tensor can take."""

from __future__ import annotations

import functools
import logging
from collections.abc import Callable
from typing import Any, Final

import torch
from torch import Tensor

from flashquant.schemes import absmax as maxima
from flashquant.schemes import fp8, int8, native, smoothed
from flashquant.schemes.smoothed import Frozen

logger = logging.getLogger(__name__)

# Rows, and where their codes are to be written (None: in new memory), to codes and scales.
Quantize = Callable[[Tensor, Tensor | None], tuple[Tensor, Tensor]]
Storing = Callable[[Tensor], float | Tensor]

# One thread reads so many faster than others are woken.
_FEW: Final = 1 << 17


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


def peak(tensor: Tensor) -> float:
    """The absolute maximum of all elements as a Python number; it is waited for."""
    if tensor.numel() < _FEW and tensor.is_contiguous() and tensor.device.type == "cpu":
        kernels = _kernels(tensor.view(1, -1))
        if kernels is not None:
            return kernels.peak(tensor)
    return absmax(tensor).item()


def int8_channel(weight: Tensor, codes: Tensor | None = None) -> tuple[Tensor, Tensor]:
    """`int8.int8_channel`."""
    made: tuple[Tensor, Tensor] = _by_rows(weight, int8).int8_channel(weight, codes)
    return made


def fp8_channel(weight: Tensor, codes: Tensor | None = None) -> tuple[Tensor, Tensor]:
    """`fp8.fp8_channel`."""
    made: tuple[Tensor, Tensor] = _by_rows(weight, fp8).fp8_channel(weight, codes)
    return made


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
    by = _by_rows(weight, smoothed)
    made: Frozen = by.int8_frozen(weight, input_scale, output_scale, codes)
    return made


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


def storing(
    quantize: Quantize | None, dtype: torch.dtype, home: Tensor, scales: Tensor | None = None
) -> Storing:
    """What stores contiguous rows right where they belong, as they are or as codes and scales.

    Args:
        quantize: `int8_channel` or `fp8_channel`; None where they are stored as they are.
        dtype: of the rows that will come.
        home: `[N, K]`, codes, or `dtype`.
        scales: `[N, 1]`, float32 and contiguous, beside codes.

    Returns:
        A function of the rows, that returns their absolute maximum, or something else that is
        finite if that is; as a tensor where a device would have to be waited for.

    """
    kernels = native.kernels() if home.device.type == "cpu" and dtype in native.TYPES else None
    if kernels is not None:
        name = "copied" if quantize is None else quantize.__name__
        return kernels.storing(name, dtype, home, scales)

    def store(weight: Tensor) -> float | Tensor:
        if quantize is None or scales is None:
            told = home.copy_(weight)
        else:
            _, told = quantize(weight, home)
            scales.copy_(told)
        top = absmax(told)
        return top.item() if top.device.type == "cpu" else top

    return store


def _kernels(weight: Tensor) -> native.Kernels | None:
    """Those that take this tensor: it has memory, and nobody watches what is done to it."""
    plain = type(weight).__torch_dispatch__ is Tensor.__torch_dispatch__
    if not plain or not native.Kernels.take(weight) or torch.compiler.is_compiling():
        return None
    return native.kernels()


def _by_rows(weight: Tensor, definition: Any) -> Any:
    """Who quantizes these rows: C on the host, Triton on a GPU, or the definition."""
    if weight.device.type == "cuda" and weight.dim() == 2 and not torch.compiler.is_compiling():
        return _on_gpu(weight.device) or definition
    return _kernels(weight) or definition


@functools.cache
def _on_gpu(device: torch.device) -> Any:
    """The Triton kernels, if they return the bits of the definitions on this device."""
    if not native.wanted():
        return None
    try:
        from flashquant.schemes import fused
    except ImportError as missing:  # Triton comes with torch for CUDA
        logger.info("rows on %s are quantized by torch: %s", device, missing)
        return None
    if (strange := fused.difference(device)) is None:
        return fused
    logger.error(
        "%s, compiled for %s, differs from its definition, so torch quantizes instead. Please "
        "report it with the output of `flashquant doctor`.",
        strange,
        torch.cuda.get_device_name(device),
    )
    return None
