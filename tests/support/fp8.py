"""How torch multiplies fp8 while tests run: in float32, on every CPU."""

from __future__ import annotations

import functools
from typing import Any


@functools.cache
def multiply_as_everywhere() -> None:
    """Keep torch from multiplying fp8 in oneDNN, in this process.

    On a CPU with AMX torch does so, and oneDNN has no kernel for it there: 60 to 300 ms a tiny
    layer, instead of one in float32, as on every other CPU. No promise depends on which it is.
    """
    import torch

    multiply = torch._scaled_mm

    @functools.wraps(multiply)
    def without_onednn(*args: Any, **kwargs: Any) -> Any:
        before = torch._C._get_mkldnn_enabled()
        torch._C._set_mkldnn_enabled(False)
        try:
            return multiply(*args, **kwargs)
        finally:
            torch._C._set_mkldnn_enabled(before)

    torch._scaled_mm = without_onednn
