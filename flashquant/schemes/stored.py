"""Which scheme a stored parameter asks for, told from its dtype, its scale and its engine."""

from __future__ import annotations

from collections.abc import Mapping
from types import MappingProxyType
from typing import Final

import torch
from torch import Tensor

from flashquant.config.schemes import INT4
from flashquant.errors import UnsupportedEngine
from flashquant.schemes.by_name import DEFINITIONS, WHOLE
from flashquant.schemes.quick import Quantize

# By what codes are; the first, unless the engine serves another one of them.
_CODES: Final[Mapping[torch.dtype, tuple[str, ...]]] = MappingProxyType(
    {
        torch.int8: ("int8", *INT4),
        torch.float8_e4m3fn: ("fp8_channel", "fp8_tensor"),
    }
)


def holds_codes(dtype: torch.dtype) -> bool:
    """Whether a parameter of this dtype holds codes, so that floats must be quantized first."""
    return dtype in _CODES


def has_groups(scheme: str) -> bool:
    """Whether a row may have several scales in this scheme, and codes of four bits."""
    return scheme in INT4


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
    served = _CODES[codes.dtype]
    asked = scheme if scheme in served else served[0]
    # How many groups there are, vLLM knows: a shard of a row has fewer than the row.
    fits = scales is not None and codes.dim() > 1 and scales.shape[:-1] == codes.shape[:-1]
    if scales is None or not fits or (scales.shape[-1] != 1 and not has_groups(asked)):
        shape = None if scales is None else tuple(scales.shape)
        raise UnsupportedEngine(
            f"{name} stores {codes.dtype} {tuple(codes.shape)} with scales of shape {shape}; "
            "flashquant quantizes into one scale an output channel, [..., N, 1]. Serve a "
            "checkpoint with channel scales, or a bf16 one with FLASHRL_CONFIG=fp8_vllm."
        )
    functions: Mapping[str, Quantize] = WHOLE if stacked else DEFINITIONS
    return functions[asked]
