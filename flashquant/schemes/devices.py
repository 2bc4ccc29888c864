"""Which device is meant, and the surroundings in which something may be launched on it."""

from __future__ import annotations

from contextlib import AbstractContextManager, nullcontext

import torch


def resolved(device: torch.device) -> torch.device:
    """The device as tensors on it name it, which `cuda` alone, without an index, is never equal to.

    Args:
        device: `cuda` stands for the one that is current now.

    """
    return torch.empty(0, device=device).device


def current(device: torch.device) -> AbstractContextManager[object]:
    """While this lasts, `device` is the current one of its kind.

    Triton launches on the current GPU and on its stream, wherever the tensors lie.
    """
    return torch.cuda.device(device) if device.type == "cuda" else nullcontext()
