"""What vLLM's CPU kernels are handed: rows, whatever a layer is called on."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import Tensor

from flashquant.patches.layers import cpu

_WEIGHT = torch.randn(5, 8, generator=torch.Generator().manual_seed(0))


def int8(x: Tensor) -> Tensor:
    return cpu._int8_by_rows(lambda _kernel, _layer, rows, _bias: _rows_only(rows), None, None, x)


def unquantized(x: Tensor) -> Tensor:
    return cpu._unquantized_by_rows(
        lambda _layer, rows, weight, _bias: _rows_only(rows), None, x, _WEIGHT
    )


def _rows_only(rows: Tensor) -> Tensor:
    """As vLLM's kernels do."""
    assert rows.dim() == 2, "mat1 must be a 2D tensor"
    return rows @ _WEIGHT.t()


@pytest.mark.parametrize("kernel", [int8, unquantized])
@pytest.mark.parametrize("shape", [(6, 8), (2, 3, 8), (1, 2, 3, 8), (8,), (0, 3, 8)])
def test_a_kernel_that_takes_rows_is_handed_rows(
    kernel: Callable[[Tensor], Tensor], shape: tuple[int, ...]
) -> None:
    x = torch.randn(shape)

    torch.testing.assert_close(kernel(x), x @ _WEIGHT.t())
