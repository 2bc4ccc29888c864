"""The kernels of `fused`: program i owns row i, reads it once from memory and writes it once.

What it takes that they return the bits of the definitions:

    division    `div_rn`; `/` is approximate on a GPU
    rounding    half to even, by adding and taking away 1.5 * 2^23
    products    not fused with what is added to them (`enable_fp_fusion=False`)
    e4m3        by the GPU's own conversion, where it has one (HAS_E4M3); else from the bits of
                float32, as in Triton's interpreter, which rounds differently

A row that fits the registers (ONCE) is loaded once; a longer one, of which codes are made after
its maximum is known, twice.
"""

from __future__ import annotations

import triton
import triton.language as tl

from flashquant.schemes.fp8 import SMALLEST_CHANNEL_SCALE

_SMALLEST: tl.constexpr = tl.constexpr(SMALLEST_CHANNEL_SCALE)
_ROUNDER: tl.constexpr = tl.constexpr(12582912.0)  # 1.5 * 2^23: its unit is 1


@triton.jit
def _loaded(row_ptr, column_stride, n_cols, start, BLOCK: tl.constexpr):
    """A block of a row in float32, its columns, and which of those there are."""
    columns = start + tl.arange(0, BLOCK).to(tl.int64)
    inside = columns < n_cols
    x = tl.load(row_ptr + columns * column_stride, mask=inside, other=0.0)
    return x.to(tl.float32), columns, inside


@triton.jit
def _peak(x):
    """The absolute maximum of a block, NaN if it holds one."""
    nans = tl.sum((x != x).to(tl.int32))
    peak = tl.max(tl.where(x != x, 0.0, tl.abs(x)))
    return tl.where(nans > 0, float("nan"), peak)


@triton.jit
def _larger(peak, other):
    """Of two maxima; NaN if one is."""
    return tl.maximum(peak, other, propagate_nan=tl.PropagateNan.ALL)


@triton.jit
def _absmax(row_ptr, column_stride, n_cols, BLOCK: tl.constexpr):
    """The absolute maximum of one row, NaN if it holds one."""
    peak = 0.0
    for start in range(0, n_cols, BLOCK):
        x, _, _ = _loaded(row_ptr, column_stride, n_cols, start, BLOCK)
        peak = _larger(peak, _peak(x))
    return peak


@triton.jit
def _round(x):
    """Half to even, for numbers of no more than 22 bits."""
    return (x + _ROUNDER) - _ROUNDER


@triton.jit
def _e4m3(x, HAS_E4M3: tl.constexpr):
    """The bits of e4m3 for numbers within ±448, half to even: as torch converts them."""
    if HAS_E4M3:
        return x.to(tl.float8e4nv).to(tl.uint8, bitcast=True)
    return _e4m3_of_bits(x)


@triton.jit
def _e4m3_of_bits(x):
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
def _int8(x, factor):
    """Codes of numbers of which none is larger than 127 once multiplied."""
    return _round(x * factor).to(tl.int8)


@triton.jit
def _int8_peak(peak):
    """1 instead of a maximum that has no reciprocal."""
    return tl.where(tl.div_rn(127.0, peak) == float("inf"), 1.0, peak)


@triton.jit
def _fp8(x, scale, HAS_E4M3: tl.constexpr):
    """Codes of numbers divided by their scale."""
    x = tl.clamp(tl.div_rn(x, tl.zeros_like(x) + scale), -448.0, 448.0)
    return _e4m3(x, HAS_E4M3)


@triton.jit
def _fp8_scale(peak):
    scale = tl.div_rn(peak, 448.0)
    return tl.where(scale < _SMALLEST, _SMALLEST, scale)  # NaN is smaller than nothing


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
    ONCE: tl.constexpr,
):
    """`int8.int8_channel`."""
    row = tl.program_id(0).to(tl.int64)
    row_ptr, into_ptr = weight_ptr + row * row_stride, codes_ptr + row * codes_row_stride
    if ONCE:
        x, columns, inside = _loaded(row_ptr, column_stride, n_cols, 0, BLOCK)
        peak = _int8_peak(_peak(x))
        codes = _int8(x, tl.div_rn(127.0, peak))
        tl.store(into_ptr + columns * codes_column_stride, codes, mask=inside)
    else:
        peak = _int8_peak(_absmax(row_ptr, column_stride, n_cols, BLOCK))
        factor = tl.div_rn(127.0, peak)
        for start in range(0, n_cols, BLOCK):
            x, columns, inside = _loaded(row_ptr, column_stride, n_cols, start, BLOCK)
            tl.store(into_ptr + columns * codes_column_stride, _int8(x, factor), mask=inside)
    tl.store(scales_ptr + row, tl.div_rn(peak, 127.0))


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
    ONCE: tl.constexpr,
    HAS_E4M3: tl.constexpr,
):
    """`fp8.fp8_channel`: divided by the scale."""
    row = tl.program_id(0).to(tl.int64)
    row_ptr, into_ptr = weight_ptr + row * row_stride, codes_ptr + row * codes_row_stride
    if ONCE:
        x, columns, inside = _loaded(row_ptr, column_stride, n_cols, 0, BLOCK)
        scale = _fp8_scale(_peak(x))
        codes = _fp8(x, scale, HAS_E4M3)
        tl.store(into_ptr + columns * codes_column_stride, codes, mask=inside)
    else:
        scale = _fp8_scale(_absmax(row_ptr, column_stride, n_cols, BLOCK))
        for start in range(0, n_cols, BLOCK):
            x, columns, inside = _loaded(row_ptr, column_stride, n_cols, start, BLOCK)
            codes = _fp8(x, scale, HAS_E4M3)
            tl.store(into_ptr + columns * codes_column_stride, codes, mask=inside)
    tl.store(scales_ptr + row, scale)


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
    HAS_E4M3: tl.constexpr,
):
    """`fp8.fp8_static`: multiplied by the reciprocal of a scale that some rows share."""
    row = tl.program_id(0).to(tl.int64)
    row_ptr, into_ptr = weight_ptr + row * row_stride, codes_ptr + row * codes_row_stride
    inverse = tl.div_rn(1.0, tl.load(scales_ptr + row // rows_a_scale))
    for start in range(0, n_cols, BLOCK):
        x, columns, inside = _loaded(row_ptr, column_stride, n_cols, start, BLOCK)
        x = x * inverse
        x = tl.where(x != x, 448.0, tl.clamp(x, -448.0, 448.0))
        tl.store(into_ptr + columns * codes_column_stride, _e4m3(x, HAS_E4M3), mask=inside)


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
    row_ptr, into_ptr = weight_ptr + row * row_stride, codes_ptr + row * codes_row_stride
    clipped = 0
    peak = 0.0
    for start in range(0, n_cols, BLOCK):
        x, columns, inside = _loaded(row_ptr, column_stride, n_cols, start, BLOCK)
        x = _smoothed(
            x, row, columns, inside, input_scale_ptr, output_scale_ptr, HAS_INPUT, HAS_OUTPUT
        )
        clipped += tl.sum((tl.abs(x) > 128.5).to(tl.int32))
        peak = _larger(peak, _peak(x))
        # Bounds are integers, so it does not matter that rounding comes after them.
        codes = _int8(tl.clamp(x, -128.0, 127.0), 1.0)
        tl.store(into_ptr + columns * codes_column_stride, codes, mask=inside)
    tl.store(clipped_ptr + row, clipped.to(tl.int64))
    tl.store(peak_ptr + row, peak)


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
    ONCE: tl.constexpr,
):
    """`smoothed.int8_refreshed`: smoothed twice, where a row is longer than registers hold."""
    row = tl.program_id(0).to(tl.int64)
    row_ptr, into_ptr = weight_ptr + row * row_stride, codes_ptr + row * codes_row_stride
    if ONCE:
        x, columns, inside = _loaded(row_ptr, column_stride, n_cols, 0, BLOCK)
        x = _smoothed(
            x, row, columns, inside, input_scale_ptr, output_scale_ptr, HAS_INPUT, HAS_OUTPUT
        )
        peak = _int8_peak(_peak(x))
        codes = _int8(x, tl.div_rn(127.0, peak))
        tl.store(into_ptr + columns * codes_column_stride, codes, mask=inside)
    else:
        peak = 0.0
        for start in range(0, n_cols, BLOCK):
            x, columns, inside = _loaded(row_ptr, column_stride, n_cols, start, BLOCK)
            x = _smoothed(
                x, row, columns, inside, input_scale_ptr, output_scale_ptr, HAS_INPUT, HAS_OUTPUT
            )
            peak = _larger(peak, _peak(x))
        peak = _int8_peak(peak)
        factor = tl.div_rn(127.0, peak)
        for start in range(0, n_cols, BLOCK):
            x, columns, inside = _loaded(row_ptr, column_stride, n_cols, start, BLOCK)
            x = _smoothed(
                x, row, columns, inside, input_scale_ptr, output_scale_ptr, HAS_INPUT, HAS_OUTPUT
            )
            tl.store(into_ptr + columns * codes_column_stride, _int8(x, factor), mask=inside)
    tl.store(scales_ptr + row, tl.load(known_ptr + row) * tl.div_rn(peak, 127.0))
