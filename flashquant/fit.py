"""Refuse a tensor before anything is touched: shape, place, dtype, values."""

from __future__ import annotations

import math
from collections.abc import Iterable

import torch
from torch import Tensor

from flashquant.errors import MisfitTensor
from flashquant.schemes.quick import peak as peak_of

# What a trainer may send; each is quantized from its own precision.
_SENT = (torch.bfloat16, torch.float16, torch.float32)


def check_plain(name: str, value: object) -> None:
    """An ordinary tensor: neither another library's array, nor sharded, nor sparse."""
    if not isinstance(value, Tensor):
        raise MisfitTensor(f"{name} is a {type(value).__name__}; send a torch.Tensor")
    if hasattr(value, "full_tensor"):
        raise MisfitTensor(
            f"{name} is a sharded {type(value).__name__}; send what its full_tensor() returns"
        )
    if value.layout is not torch.strided:
        raise MisfitTensor(f"{name} is laid out as {value.layout}; send a dense tensor")


def check_form(name: str, tensor: Tensor, shape: tuple[int, ...]) -> None:
    """The whole, unsharded tensor, with values in it."""
    if tuple(tensor.shape) != shape:
        raise MisfitTensor(
            f"{name} has shape {tuple(tensor.shape)}, but should have {shape}. "
            "Send the whole, unsharded tensor of the model the engine was started on."
        )
    if tensor.is_meta:
        raise MisfitTensor(f"{name} is on the meta device; send a tensor that holds values")


def check_dtype(name: str, sent: torch.dtype, stored: torch.dtype) -> None:
    """Floats go anywhere; codes only into parameters of their own dtype."""
    if sent == stored or sent in _SENT:
        return
    raise MisfitTensor(
        f"{name} is {sent}, but the engine stores {stored}. "
        f"Send bfloat16, float16 or float32, or {stored} codes with their scales."
    )


def check_finite(name: str, tensor: Tensor, stored: Iterable[torch.dtype] = ()) -> None:
    """One pass: the absolute maximum tells whether every value is finite, and stays so stored."""
    if not tensor.is_floating_point():
        return
    if tensor.element_size() == 1:  # codes: torch has no maximum of float8, and e4m3 no infinity
        peak = math.nan if tensor.isnan().any() else 0.0
    else:
        peak = peak_of(tensor)
    if not math.isfinite(peak):
        raise MisfitTensor(
            f"{name} holds NaN or infinite values. Look at the trainer's last step; "
            "the engine still serves the weights it had."
        )
    for dtype in stored:
        if dtype.is_floating_point and peak > torch.finfo(dtype).max:
            raise MisfitTensor(
                f"{name} holds values up to {peak:.3g}, beyond what {dtype} can store "
                f"({torch.finfo(dtype).max:.3g}). Serve the engine in bfloat16."
            )
