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

import torch
from torch import Tensor

from flashquant.schemes import fp8, fused, int8, smoothed

DTYPES = (torch.bfloat16, torch.float16, torch.float32)
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


def far(dtype: torch.dtype) -> Tensor:
    """The third row begins beyond element 2^31 of a storage, most of which is never touched."""
    apart = 2**30 + 8
    spread = torch.empty(2 * apart + 64, dtype=dtype).as_strided((3, 64), (apart, 1))
    return spread.copy_(weight(3, 64, dtype))


def frozen(module: Any, *, rows: bool, columns: bool) -> Quantize:
    def quantize(values: Tensor, codes: Tensor | None) -> Any:
        dice = torch.Generator().manual_seed(1)
        n, k = values.shape
        by_column = torch.rand(k, generator=dice) * 30 if columns else None
        by_row = torch.rand(n, generator=dice) * 9 if rows else None
        return module.int8_frozen(values, by_column, by_row, codes)

    return quantize


def pairs() -> Iterator[tuple[str, Quantize, Quantize, torch.dtype]]:
    yield "int8_channel", fused.int8_channel, int8.int8_channel, torch.int8
    yield "fp8_channel", fused.fp8_channel, fp8.fp8_channel, torch.float8_e4m3fn
    for rows, columns in ((True, True), (True, False), (False, True), (False, False)):
        chosen = {"rows": rows, "columns": columns}
        name = "int8_frozen" + "_rows" * rows + "_columns" * columns
        yield name, frozen(fused, **chosen), frozen(smoothed, **chosen), torch.int8


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


def main() -> None:
    found: dict[str, list[Any]] = {}
    for dtype in DTYPES:
        for shape, values in shapes(dtype):
            for name, kernel, definition, stored in pairs():
                into = destination(values.shape, stored, shape)
                key = f"{name}-{str(dtype).removeprefix('torch.')}-{shape}"
                found[key] = different(kernel(values, into), definition(values, None))
        for bad in (float("nan"), float("inf"), float("-inf")):
            values = weight(4, 40, dtype)
            values[2, 39] = bad
            for name, kernel, definition, _ in list(pairs())[:2]:
                # By its scale a row is known that must not be stored; its codes mean nothing.
                # NaN has many bits, and one meaning.
                ours, theirs = (
                    quantize(values, None)[1].nan_to_num(-1.0, posinf=float("inf"))
                    for quantize in (kernel, definition)
                )
                found[f"{name}-{str(dtype).removeprefix('torch.')}-{bad}"] = different(
                    [ours], [theirs]
                )
    found["difference"] = [str(fused.difference(torch.device("cpu")))]
    Path(sys.argv[1]).write_text(json.dumps(found))


if __name__ == "__main__":
    main()
