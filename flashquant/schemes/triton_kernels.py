"""The kernels of `fused`: program i owns row i, reads it once from memory and writes it once.

What it takes that they return the bits of the definitions:

    division    `div_rn`; `/` is approximate on a GPU
    rounding    half to even, by adding and taking away 1.5 * 2^23
    products    not fused with what is added to them (`enable_fp_fusion=False`)
    e4m3        from the bits of float32; Triton's own conversion wants a GPU that has one,
                and rounds differently in its interpreter
"""

from __future__ import annotations

import triton
import triton.language as tl

from flashquant.schemes.fp8 import SMALLEST_CHANNEL_SCALE

_SMALLEST: tl.constexpr = tl.constexpr(SMALLEST_CHANNEL_SCALE)
_ROUNDER: tl.constexpr = tl.constexpr(12582912.0)  # 1.5 * 2^23: its unit is 1


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
def _smoothed(x, row, columns, inside, input_ptr, output_ptr, HAS_INPUT, HAS_OUTPUT):
    """(weight * output_scale) * input_scale, in this order."""
    if HAS_OUTPUT:
        x = x * tl.load(output_ptr + row)
    if HAS_INPUT:
        x = x * tl.load(input_ptr + columns, mask=inside, other=0.0)
    return x


@triton.jit
def absmax_row(
    weight_ptr,
    peaks_ptr,
    n_cols,
    row_stride,
    column_stride,
    divisor,
    BLOCK: tl.constexpr,
):
    """The absolute maximum of a row, divided by a number: by 1, that is exact."""
    row = tl.program_id(0).to(tl.int64)
    peak = _absmax(weight_ptr + row * row_stride, column_stride, n_cols, BLOCK)
    tl.store(peaks_ptr + row, tl.div_rn(peak, divisor))


@triton.jit
def int8_row(
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
    """`int8.int8_channel`."""
    row = tl.program_id(0).to(tl.int64)
    row_ptr = weight_ptr + row * row_stride
    peak = _absmax(row_ptr, column_stride, n_cols, BLOCK)
    peak = tl.where(tl.div_rn(127.0, peak) == float("inf"), 1.0, peak)
    tl.store(scales_ptr + row, tl.div_rn(peak, 127.0))
    factor = tl.div_rn(127.0, peak)
    for start in range(0, n_cols, BLOCK):
        columns = start + tl.arange(0, BLOCK).to(tl.int64)
        inside = columns < n_cols
        x = tl.load(row_ptr + columns * column_stride, mask=inside, other=0.0).to(tl.float32)
        into = codes_ptr + row * codes_row_stride + columns * codes_column_stride
        tl.store(into, _round(x * factor).to(tl.int8), mask=inside)


@triton.jit
def fp8_row(
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
    """`fp8.fp8_channel`: divided by the scale."""
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


@triton.jit(do_not_specialize=["rows_a_scale"])
def static_row(
    weight_ptr,
    codes_ptr,
    scales_ptr,
    rows_a_scale,
    n_cols,
    row_stride,
    column_stride,
    codes_row_stride,
    codes_column_stride,
    BLOCK: tl.constexpr,
):
    """`fp8.fp8_static`: multiplied by the reciprocal of a scale that some rows share."""
    row = tl.program_id(0).to(tl.int64)
    row_ptr = weight_ptr + row * row_stride
    inverse = tl.div_rn(1.0, tl.load(scales_ptr + row // rows_a_scale))
    for start in range(0, n_cols, BLOCK):
        columns = start + tl.arange(0, BLOCK).to(tl.int64)
        inside = columns < n_cols
        x = tl.load(row_ptr + columns * column_stride, mask=inside, other=0.0).to(tl.float32)
        x = x * inverse
        x = tl.where(x != x, 448.0, tl.clamp(x, -448.0, 448.0))
        into = codes_ptr + row * codes_row_stride + columns * codes_column_stride
        tl.store(into, _e4m3(x), mask=inside)


@triton.jit
def frozen_row(
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
    """`smoothed.int8_frozen`, and what is counted of the row."""
    row = tl.program_id(0).to(tl.int64)
    row_ptr = weight_ptr + row * row_stride
    clipped = 0
    nans = 0
    peak = 0.0
    for start in range(0, n_cols, BLOCK):
        columns = start + tl.arange(0, BLOCK).to(tl.int64)
        inside = columns < n_cols
        x = tl.load(row_ptr + columns * column_stride, mask=inside, other=0.0).to(tl.float32)
        x = _smoothed(
            x, row, columns, inside, input_scale_ptr, output_scale_ptr, HAS_INPUT, HAS_OUTPUT
        )
        clipped += tl.sum((tl.abs(x) > 128.5).to(tl.int32))
        nans += tl.sum((x != x).to(tl.int32))
        peak = tl.maximum(peak, tl.max(tl.where(x != x, 0.0, tl.abs(x))))
        into = codes_ptr + row * codes_row_stride + columns * codes_column_stride
        # Bounds are integers, so it does not matter that rounding comes after them.
        tl.store(into, _round(tl.clamp(x, -128.0, 127.0)).to(tl.int8), mask=inside)
    tl.store(clipped_ptr + row, clipped.to(tl.int64))
    tl.store(peak_ptr + row, tl.where(nans > 0, float("nan"), peak))


@triton.jit
def refreshed_row(
    weight_ptr,
    codes_ptr,
    input_scale_ptr,
    output_scale_ptr,
    known_ptr,
    scales_ptr,
    n_cols,
    row_stride,
    column_stride,
    codes_row_stride,
    codes_column_stride,
    HAS_INPUT: tl.constexpr,
    HAS_OUTPUT: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """`smoothed.int8_refreshed`: smoothed twice, since a row may be longer than registers hold."""
    row = tl.program_id(0).to(tl.int64)
    row_ptr = weight_ptr + row * row_stride
    peak = 0.0
    nans = 0
    for start in range(0, n_cols, BLOCK):
        columns = start + tl.arange(0, BLOCK).to(tl.int64)
        inside = columns < n_cols
        x = tl.load(row_ptr + columns * column_stride, mask=inside, other=0.0).to(tl.float32)
        x = _smoothed(
            x, row, columns, inside, input_scale_ptr, output_scale_ptr, HAS_INPUT, HAS_OUTPUT
        )
        nans += tl.sum((x != x).to(tl.int32))
        peak = tl.maximum(peak, tl.max(tl.where(x != x, 0.0, tl.abs(x))))
    peak = tl.where(nans > 0, float("nan"), peak)
    peak = tl.where(tl.div_rn(127.0, peak) == float("inf"), 1.0, peak)
    tl.store(scales_ptr + row, tl.load(known_ptr + row) * tl.div_rn(peak, 127.0))
    factor = tl.div_rn(127.0, peak)
    for start in range(0, n_cols, BLOCK):
        columns = start + tl.arange(0, BLOCK).to(tl.int64)
        inside = columns < n_cols
        x = tl.load(row_ptr + columns * column_stride, mask=inside, other=0.0).to(tl.float32)
        x = _smoothed(
            x, row, columns, inside, input_scale_ptr, output_scale_ptr, HAS_INPUT, HAS_OUTPUT
        )
        into = codes_ptr + row * codes_row_stride + columns * codes_column_stride
        tl.store(into, _round(x * factor).to(tl.int8), mask=inside)
