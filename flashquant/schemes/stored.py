"""Which scheme a stored parameter asks for, told from its dtype, its scale and its engine."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor

from flashquant.errors import UnsupportedEngine
from flashquant.schemes.by_name import DEFINITIONS, WHOLE
from flashquant.schemes.quick import Quantize

# By what codes are; the first, unless the engine serves another one of them.
_CODES = {torch.int8: ("int8",), torch.float8_e4m3fn: ("fp8_channel", "fp8_tensor")}


def holds_codes(dtype: torch.dtype) -> bool:
    """Whether a parameter of this dtype holds codes, so that floats must be quantized first."""
    return dtype in _CODES


def quantizer(
    codes: Tensor, scales: Tensor | None, name: str, scheme: str = "", *, stacked: bool = False
) -> Quantize:
    """The function that turns floats into what a pair of parameters stores.

    Args:
        codes: the parameter that holds the codes, `[N, K]`, or of all experts `[E, N, K]`, on
            any device.
        scales: the one that holds its scales, or None.
        name: of the parameter, for the error.
        scheme: that the engine serves.
        stacked: whether what comes may be the matrices of all experts, `[E, N, K]`, contiguous;
            else it is one, `[N, K]`.

    Raises:
        UnsupportedEngine: the pair is none of our schemes.

    """
    if scales is None or codes.dim() < 2 or tuple(scales.shape) != (*codes.shape[:-1], 1):
        shape = None if scales is None else tuple(scales.shape)
        raise UnsupportedEngine(
            f"{name} stores {codes.dtype} {tuple(codes.shape)} with scales of shape {shape}; "
            "flashquant quantizes into one scale an output channel, [..., N, 1]. Serve a "
            "checkpoint with channel scales, or a bf16 one with FLASHRL_CONFIG=fp8_vllm."
        )
    served = _CODES[codes.dtype]
    functions: Mapping[str, Quantize] = WHOLE if stacked else DEFINITIONS
    return functions[scheme if scheme in served else served[0]]
