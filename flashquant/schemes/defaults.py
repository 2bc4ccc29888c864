"""Torch as it is with its own defaults: float32, and the host."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import torch


@contextmanager
def torchs_own() -> Iterator[None]:
    """As a decorator, of a function that makes tensors to compare with.

    vLLM makes the dtype of the model the default while it loads. A kernel for float32 that is
    looked at then would be given bf16.
    """
    before = torch.get_default_dtype()
    torch.set_default_dtype(torch.float32)
    try:
        with torch.device("cpu"):
            yield
    finally:
        torch.set_default_dtype(before)
