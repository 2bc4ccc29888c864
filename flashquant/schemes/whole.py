"""What a layer holds, quantized in one go: a matrix `[N, K]`, or those of all experts `[E, N, K]`.

Experts lie one below the other, so their rows are those of one tall matrix: a launch or three on a
GPU, where one expert after another takes as many for each.
"""

from __future__ import annotations

from torch import Tensor

from flashquant.schemes import fp8, quick


def int8_channel(weight: Tensor, codes: Tensor | None = None) -> tuple[Tensor, Tensor]:
    """`int8.int8_channel`, of each; as `fp8_channel`."""
    made, scales = quick.int8_channel(_tall(weight), None if codes is None else _tall(codes))
    return made.view(weight.shape), scales.view(*weight.shape[:-1], 1)


def fp8_channel(weight: Tensor, codes: Tensor | None = None) -> tuple[Tensor, Tensor]:
    """`fp8.fp8_channel`, of each: scales `[N, 1]` or `[E, N, 1]`, float32.

    Args:
        weight: contiguous.
        codes: likewise, where they are to be written; new memory if not given.

    """
    made, scales = quick.fp8_channel(_tall(weight), None if codes is None else _tall(codes))
    return made.view(weight.shape), scales.view(*weight.shape[:-1], 1)


def fp8_tensor(weight: Tensor, codes: Tensor | None = None) -> tuple[Tensor, Tensor]:
    """`fp8.fp8_tensor`, of each: scales `[1]` or `[E]`, float32. Arguments as above."""
    if weight.dim() == 2:
        return quick.fp8_tensor(weight, codes)
    into = None if codes is None else _tall(codes)
    made, scales = quick.fp8_tensors(_tall(weight), len(weight), into)
    return made.view(weight.shape), scales


def fp8_tensor_rows(weight: Tensor, codes: Tensor | None = None) -> tuple[Tensor, Tensor]:
    """`fp8.fp8_tensor_rows`, of each: scales `[N, 1]` or `[E, N, 1]`. Arguments as above."""
    made, scales = fp8_tensor(weight, codes)
    return made, fp8.filled(scales, weight)


def _tall(weight: Tensor) -> Tensor:
    return weight if weight.dim() == 2 else weight.view(-1, weight.shape[-1])
