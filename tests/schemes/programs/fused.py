"""The Triton kernels in Triton's interpreter, beside their definitions.

The interpreter has to be chosen before Triton is imported, hence a program. For each case it
writes which of the results have other bits: `{"int8_channel-bfloat16-ragged": []}`.
"""

from __future__ import annotations

import json
import os
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

os.environ["TRITON_INTERPRET"] = "1"

import numpy as np
import torch
import triton.language as tl
from torch import Tensor
from triton.runtime import interpreter

from flashquant.schemes import absmax, fp8, fused, int8, smoothed

DTYPES = (torch.bfloat16, torch.float16, torch.float32)
FP8 = torch.float8_e4m3fn
Quantize = Callable[[Tensor, Tensor | None], Any]


def shapes(dtype: torch.dtype) -> Iterator[tuple[str, Tensor]]:
    """Weights of every kind of shape and stride; rows of very different sizes, zeros among them."""
    yield "ragged", weight(7, 272 + 5, dtype)
    yield "one-column", weight(5, 1, dtype)
    yield "several-blocks", weight(3, 8192 + 17, dtype)
    yield "no-rows", weight(0, 16, dtype)
    yield "zeros", torch.zeros(3, 40, dtype=dtype)
    yield "transposed", weight(40, 9, dtype).t()
    yield "window", weight(12, 64, dtype)[2:9:2, 3:50]
    yield "halfway", halfway(dtype)
    yield "tiny", tiny(dtype)
    yield "far", far(dtype)


def weight(rows: int, columns: int, dtype: torch.dtype) -> Tensor:
    dice = torch.Generator().manual_seed(rows)
    sizes = torch.logspace(-6, 2, max(rows, 1))[:rows, None]
    values = (torch.randn(rows, columns, generator=dice) * sizes).to(dtype)
    values[1:2] = 0
    return values


def halfway(dtype: torch.dtype) -> Tensor:
    """Numbers right between two codes, which go to the even one."""
    steps = torch.arange(-254, 255) / 2
    return torch.stack([steps, steps * 2, steps.sign() * 127]).to(dtype)


def tiny(dtype: torch.dtype) -> Tensor:
    """Rows of numbers that have no reciprocal, down to the smallest; as one tensor, too."""
    sizes = torch.logspace(-22.5, -18, 10)[:, None] ** 2
    return (torch.randn(10, 33, generator=torch.Generator().manual_seed(5)) * sizes).to(dtype)


def far(dtype: torch.dtype) -> Tensor:
    """The third row begins beyond element 2^31 of a storage, most of which is never touched."""
    apart = 2**30 + 8
    spread = torch.empty(2 * apart + 64, dtype=dtype).as_strided((3, 64), (apart, 1))
    return spread.copy_(weight(3, 64, dtype))


def smoothing(module: Any, name: str, *, rows: bool, columns: bool) -> Quantize:
    """A function of `smoothed`, with factors for rows, for columns, or for both."""

    def quantize(values: Tensor, codes: Tensor | None) -> Any:
        dice = torch.Generator().manual_seed(1)
        n, k = values.shape
        by_column = torch.rand(k, generator=dice) * 30 if columns else None
        by_row = torch.rand(n, generator=dice) * 9 if rows else None
        known = [] if name == "int8_frozen" else [torch.rand(n, 1, generator=dice)]
        return getattr(module, name)(values, by_column, by_row, *known, codes)

    return quantize


def absmaxes(module: Any) -> Quantize:
    """Of each row, and of all of them."""

    def maxima(values: Tensor, _: Tensor | None) -> Any:
        every = values.contiguous()
        return module.row_absmax(values), module.absmax(every), module.absmax(values.flatten()[:3])

    return maxima


def static(module: Any, *, rows: bool) -> Quantize:
    """Given scales: one of which the reciprocal overflows, and one of zeros, among them."""

    def quantize(values: Tensor, codes: Tensor | None) -> Any:
        scales = torch.logspace(-7, 1, max(1, len(values)))[:, None]
        scales[2:3], scales[3:4] = 0.0, 1e-39
        return (module.fp8_static(values, scales if rows else torch.tensor(0.037), codes),)

    return quantize


def experts(module: Any) -> Quantize:
    """Three matrices below each other, of as many rows as there are."""

    def quantize(values: Tensor, _: Tensor | None) -> Any:
        stack = torch.cat([values, 3 * values, 0 * values])
        return module.fp8_tensors(stack, 3)

    return quantize


def bound(name: str, dtype: torch.dtype) -> Quantize:
    """What was bound to the live memory in which codes and scales belong, of rows side by side."""

    def quantize(values: Tensor, codes: Tensor | None) -> Any:
        into = torch.empty(values.shape, dtype=dtype) if codes is None else codes
        scales = torch.empty(len(values), 1)
        store = fused.bound(name, into, scales)
        for rows in (values.flip(0), values):  # again and again
            if len(rows):
                store(rows.contiguous())
        return into, scales

    return quantize


def pairs() -> Iterator[tuple[str, Quantize, Quantize, torch.dtype]]:
    yield "absmax", absmaxes(fused), absmaxes(absmax), torch.int8
    yield "int8_channel", fused.int8_channel, int8.int8_channel, torch.int8
    yield "fp8_channel", fused.fp8_channel, fp8.fp8_channel, FP8
    yield "int8_channel_bound", bound("int8_channel", torch.int8), int8.int8_channel, torch.int8
    yield "fp8_channel_bound", bound("fp8_channel", FP8), fp8.fp8_channel, FP8
    yield "fp8_tensor", fused.fp8_tensor, fp8.fp8_tensor, FP8
    yield "fp8_tensors", experts(fused), experts(fp8), FP8
    yield "fp8_static", static(fused, rows=False), static(fp8, rows=False), FP8
    yield "fp8_static_rows", static(fused, rows=True), static(fp8, rows=True), FP8
    for kind in ("int8_frozen", "int8_refreshed"):
        for rows, columns in ((True, True), (True, False), (False, True), (False, False)):
            chosen = {"rows": rows, "columns": columns}
            ours, defined = (smoothing(module, kind, **chosen) for module in (fused, smoothed))
            yield kind + "_rows" * rows + "_columns" * columns, ours, defined, torch.int8


def scale_of(made: Any) -> Tensor:
    """By which a row or a tensor is known that must not be stored; its codes mean nothing."""
    told: Tensor = made.peak if hasattr(made, "peak") else made[1]
    return told.nan_to_num(-1.0, posinf=float("inf"))  # NaN has many bits, and one meaning


def destination(shape: torch.Size, dtype: torch.dtype, name: str) -> Tensor | None:
    """Where codes go: new memory, a window of a fused layer, or far away."""
    if name == "window":
        return torch.empty(shape[0] + 4, shape[1], dtype=dtype)[2:-2]
    if name == "far":
        return torch.empty(2**31 + 256, dtype=dtype).as_strided(shape, (2**30 + 8, 1))
    return None


def different(ours: Any, theirs: Any) -> list[int]:
    """Which results have other bits."""
    together = enumerate(zip(ours, theirs, strict=True))
    return [index for index, (one, other) in together if not same(one, other)]


def same(one: Tensor, other: Tensor) -> bool:
    if (one.shape, one.dtype) != (other.shape, other.dtype):
        return False
    one, other = (tensor.contiguous().reshape(-1).view(torch.uint8) for tensor in (one, other))
    return torch.equal(one, other)


def widen_subnormal_bf16_as_a_gpu_does() -> None:
    """By a shift. The interpreter (of Triton 3.9) makes other numbers of those below 1.2e-38."""
    convert = interpreter._convert_float

    def converted(values: Any, source: Any, target: Any, rounding: Any) -> Any:
        if (source, target) == (tl.bfloat16, tl.float32):
            return values.astype(np.uint32) << 16
        return convert(values, source, target, rounding)

    interpreter._convert_float = converted


def main() -> None:
    widen_subnormal_bf16_as_a_gpu_does()
    found: dict[str, list[Any]] = {}
    for dtype in DTYPES:
        name_of_dtype = str(dtype).removeprefix("torch.")
        for shape, values in shapes(dtype):
            for name, kernel, definition, stored in pairs():
                if shape == "no-rows" and not name.startswith(("int8", "fp8_channel")):
                    continue  # there is no maximum, so nobody asks
                into = destination(values.shape, stored, shape)
                found[f"{name}-{name_of_dtype}-{shape}"] = different(
                    kernel(values, into), definition(values, None)
                )
        for bad in (float("nan"), float("inf"), float("-inf")):
            values = weight(4, 40, dtype)
            values[2, 39] = bad
            for name, kernel, definition, _ in pairs():
                if not name.startswith("fp8_static"):
                    scales = (scale_of(made(values, None)) for made in (kernel, definition))
                    found[f"{name}-{name_of_dtype}-{bad}"] = different(*([s] for s in scales))
    found["difference"] = [str(fused.difference(torch.device("cpu")))]
    Path(sys.argv[1]).write_text(json.dumps(found))


if __name__ == "__main__":
    main()
