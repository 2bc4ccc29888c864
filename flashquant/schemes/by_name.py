"""The definition of each scheme, under the name of its record in `flashquant.config.schemes`."""

from __future__ import annotations

from collections.abc import Mapping
from functools import partial
from types import MappingProxyType
from typing import Final

from flashquant.config.schemes import INT4
from flashquant.schemes import whole
from flashquant.schemes.int4 import int4_group
from flashquant.schemes.quick import (
    Quantize,
    fp8_channel,
    fp8_tensor,
    fp8_tensor_rows,
    int8_channel,
)

# Of one matrix or of many: rows know nothing of each other.
_BY_GROUP: Final[Mapping[str, Quantize]] = {
    name: partial(int4_group, group=group) for name, group in INT4.items()
}

DEFINITIONS: Final[Mapping[str, Quantize]] = MappingProxyType(
    {
        "int8": int8_channel,
        "fp8_channel": fp8_channel,
        "fp8_tensor": fp8_tensor_rows,
        "fp8_vllm": fp8_tensor,
        **_BY_GROUP,
    }
)
"""Rows `[N, K]` -> codes and scales; where it is not vLLM that quantizes every push."""

WHOLE: Final[Mapping[str, Quantize]] = MappingProxyType(
    {
        "int8": whole.int8_channel,
        "fp8_channel": whole.fp8_channel,
        "fp8_tensor": whole.fp8_tensor_rows,
        "fp8_vllm": whole.fp8_tensor,
        **_BY_GROUP,
    }
)
"""The same for a matrix, or all experts of a layer, `[E, N, K]`, each by itself."""
