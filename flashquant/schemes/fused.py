"""The definitions as Triton kernels, for GPUs: each row is read once and written once.

They return the bits of `int8`, `fp8` and `smoothed`. What that takes:

    division    `div_rn`; `/` is approximate on a GPU
    rounding    half to even, by adding and taking away 1.5 * 2^23
    products    not fused with what is added to them (`enable_fp_fusion=False`)
    e4m3        from the bits of float32; Triton's own conversion wants a GPU that has one,
                and rounds differently in its interpreter

Imported only where there is a GPU: Triton is not a dependency.
"""

from __future__ import annotations

import functools
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from flashquant.schemes import absmax, fp8, int8, native, smoothed
from flashquant.schemes.fp8 import FP8, SMALLEST_CHANNEL_SCALE
from flashquant.schemes.smoothed import Frozen

_SMALLEST: tl.constexpr = tl.constexpr(SMALLEST_CHANNEL_SCALE)
_ROUNDER: tl.constexpr = tl.constexpr(12582912.0)  # 1.5 * 2^23: its unit is 1
_LARGEST_BLOCK = 8192
_OPTIONS = {"num_warps": 8, "enable_fp_fusion": False}


def int8_channel(weight: Tensor, codes: Tensor | None = None) -> tuple[Tensor, Tensor]:
    """`int8.int8_channel`, for a weight on a GPU with any strides."""
    return _by_rows(_int8_row, weight, codes, torch.int8)


def fp8_channel(weight: Tensor, codes: Tensor | None = None) -> tuple[Tensor, Tensor]:
    """`fp8.fp8_channel`, likewise."""
    return _by_rows(_fp8_row, weight, codes, FP8)


def int8_frozen(
    weight: Tensor,
    input_scale: Tensor | None,
    output_scale: Tensor | None,
    codes: Tensor | None = None,
) -> Frozen:
    """`smoothed.int8_frozen`, likewise."""
    codes = _destination(weight, codes, torch.int8)
    clipped = torch.zeros(weight.shape[0], dtype=torch.int64, device=weight.device)
    peak = torch.zeros(weight.shape[0], dtype=torch.float32, device=weight.device)
    if weight.numel():
        _frozen_row[(weight.shape[0],)](
            weight,
            codes,
            # A pointer that is not followed, where there is no scale.
            weight if input_scale is None else input_scale.contiguous(),
            weight if output_scale is None else output_scale.contiguous(),
            clipped,
            peak,
            *_strides(weight, codes),
            HAS_INPUT=input_scale is not None,
            HAS_OUTPUT=output_scale is not None,
            BLOCK=_block(weight),
            **_OPTIONS,
        )
    largest = peak.max() if len(peak) else torch.zeros((), device=weight.device)
    return Frozen(codes, clipped.sum(), largest / 127)


@functools.cache
def difference(device: torch.device) -> str | None:
    """The first kernel that returns other bits than its definition on a device, by name.

    What is compiled for a GPU is believed only after this has returned None there.
    """
    for weight in (rows.to(device) for rows in native.hard_rows()):
        columns = torch.linspace(0.5, 1.5, weight.shape[1], device=device)
        rows = torch.linspace(1, 90, len(weight), device=device) / absmax.row_absmax(weight)[:, 0]
        rows = torch.where(rows.isfinite(), rows, 1.0)
        compared: dict[str, tuple[Any, Any]] = {
            "int8_channel": (int8_channel(weight), int8.int8_channel(weight)),
            "fp8_channel": (fp8_channel(weight), fp8.fp8_channel(weight)),
            "int8_frozen": (
                int8_frozen(weight, columns, rows),
                smoothed.int8_frozen(weight, columns, rows),
            ),
        }
        for name, (ours, defined) in compared.items():
            if not all(map(_same, ours, defined)):
                return f"{name} of {weight.dtype}"
    return None


def _same(one: Tensor, other: Tensor) -> bool:
    one, other = (tensor.reshape(-1).view(torch.uint8) for tensor in (one, other))
    return torch.equal(one, other)


def _by_rows(
    kernel: Any, weight: Tensor, codes: Tensor | None, dtype: torch.dtype
) -> tuple[Tensor, Tensor]:
    codes = _destination(weight, codes, dtype)
    scales = torch.empty((weight.shape[0], 1), dtype=torch.float32, device=weight.device)
    if weight.shape[0]:
        memory = codes.view(torch.uint8) if dtype == FP8 else codes
        kernel[(weight.shape[0],)](
            weight, memory, scales, *_strides(weight, codes), BLOCK=_block(weight), **_OPTIONS
        )
    return codes, scales


def _destination(weight: Tensor, codes: Tensor | None, dtype: torch.dtype) -> Tensor:
    if codes is not None:
        return codes
    return torch.empty(weight.shape, dtype=dtype, device=weight.device)


def _strides(weight: Tensor, codes: Tensor) -> tuple[int, ...]:
    return (weight.shape[1], *weight.stride(), *codes.stride())


def _block(weight: Tensor) -> int:
    """Columns at a time: the whole row, or as much of it as registers hold."""
    return min(_LARGEST_BLOCK, max(16, int(triton.next_power_of_2(weight.shape[1]))))


@triton.jit
def _absmax(row_ptr, column_stride, n_cols, BLOCK: tl.constexpr):
    """The absolute maximum of one row, NaN if it holds one."""
    peak = 0.0
    nans = 0
    for start in range(0, n_cols, BLOCK):
        columns = start + tl.arange(0, BLOCK).to(tl.int64)
        x = tl.load(row_ptr + columns * column_stride, mask=columns < n_cols, other=0.0)
        x = x.to(tl.float32)
        nans += tl.sum((x != x).to(tl.int32))
        peak = tl.maximum(peak, tl.max(tl.where(x != x, 0.0, tl.abs(x))))
    return tl.where(nans > 0, float("nan"), peak)


@triton.jit
def _round(x):
    """Half to even, for numbers of no more than 22 bits."""
    return (x + _ROUNDER) - _ROUNDER


@triton.jit
def _e4m3(x):
    """The bits of e4m3 for numbers within ±448, half to even: as torch converts them."""
    bits = x.to(tl.int32, bitcast=True)
    size = bits & 0x7FFFFFFF
    # A normal number: another bias of the exponent, 20 bits of mantissa less.
    normal = (size - 1006632960 + 0x7FFFF + ((size >> 20) & 1)) >> 20
    # One below 2^-6: float32 rounds it, when it is added to 2^14.
    tiny = (tl.abs(x) + 16384.0).to(tl.int32, bitcast=True) - 1182793728
    code = tl.where(size < 1015021568, tiny, normal)
    code = tl.where(size > 0x7F800000, 0x7F, code)
    return (code | tl.where(bits < 0, 0x80, 0)).to(tl.uint8)


@triton.jit
def _int8_row(
    weight_ptr,
    codes_ptr,
    scales_ptr,
    n_cols,
    row_stride,
    column_stride,
    codes_row_stride,
    codes_column_stride,
    BLOCK: tl.constexpr,
):
    """Program i owns row i."""
    row = tl.program_id(0).to(tl.int64)
    row_ptr = weight_ptr + row * row_stride
    peak = _absmax(row_ptr, column_stride, n_cols, BLOCK)
    peak = tl.where(peak == 0.0, 1.0, peak)
    tl.store(scales_ptr + row, tl.div_rn(peak, 127.0))
    factor = tl.div_rn(127.0, peak)
    for start in range(0, n_cols, BLOCK):
        columns = start + tl.arange(0, BLOCK).to(tl.int64)
        inside = columns < n_cols
        x = tl.load(row_ptr + columns * column_stride, mask=inside, other=0.0).to(tl.float32)
        into = codes_ptr + row * codes_row_stride + columns * codes_column_stride
        tl.store(into, _round(x * factor).to(tl.int8), mask=inside)


@triton.jit
def _fp8_row(
    weight_ptr,
    codes_ptr,
    scales_ptr,
    n_cols,
    row_stride,
    column_stride,
    codes_row_stride,
    codes_column_stride,
    BLOCK: tl.constexpr,
):
    """Program i owns row i."""
    row = tl.program_id(0).to(tl.int64)
    row_ptr = weight_ptr + row * row_stride
    peak = _absmax(row_ptr, column_stride, n_cols, BLOCK)
    scale = tl.div_rn(peak, 448.0)
    scale = tl.where(scale < _SMALLEST, _SMALLEST, scale)  # NaN is smaller than nothing
    tl.store(scales_ptr + row, scale)
    for start in range(0, n_cols, BLOCK):
        columns = start + tl.arange(0, BLOCK).to(tl.int64)
        inside = columns < n_cols
        x = tl.load(row_ptr + columns * column_stride, mask=inside, other=0.0).to(tl.float32)
        x = tl.clamp(tl.div_rn(x, tl.zeros_like(x) + scale), -448.0, 448.0)
        into = codes_ptr + row * codes_row_stride + columns * codes_column_stride
        tl.store(into, _e4m3(x), mask=inside)


@triton.jit
def _frozen_row(
    weight_ptr,
    codes_ptr,
    input_scale_ptr,
    output_scale_ptr,
    clipped_ptr,
    peak_ptr,
    n_cols,
    row_stride,
    column_stride,
    codes_row_stride,
    codes_column_stride,
    HAS_INPUT: tl.constexpr,
    HAS_OUTPUT: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """Program i owns row i, and what is counted of it."""
    row = tl.program_id(0).to(tl.int64)
    row_ptr = weight_ptr + row * row_stride
    clipped = 0
    peak = 0.0
    for start in range(0, n_cols, BLOCK):
        columns = start + tl.arange(0, BLOCK).to(tl.int64)
        inside = columns < n_cols
        x = tl.load(row_ptr + columns * column_stride, mask=inside, other=0.0).to(tl.float32)
        if HAS_OUTPUT:
            x = x * tl.load(output_scale_ptr + row)
        if HAS_INPUT:
            x = x * tl.load(input_scale_ptr + columns, mask=inside, other=0.0)
        clipped += tl.sum((tl.abs(x) > 128.5).to(tl.int32))
        peak = tl.maximum(peak, tl.max(tl.abs(x)))
        into = codes_ptr + row * codes_row_stride + columns * codes_column_stride
        # Bounds are integers, so it does not matter that rounding comes after them.
        tl.store(into, _round(tl.clamp(x, -128.0, 127.0)).to(tl.int8), mask=inside)
    tl.store(clipped_ptr + row, clipped.to(tl.int64))
    tl.store(peak_ptr + row, peak)
