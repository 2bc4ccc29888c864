"""The sums by the fastest implementation that takes this tensor."""

from __future__ import annotations

import functools
import logging
from typing import Any

import torch
from torch import Tensor

from flashquant.schemes import devices
from flashquant.schemes.fingerprints import definition, native
from flashquant.schemes.native import wanted

logger = logging.getLogger(__name__)


def sums(tensor: Tensor) -> tuple[int, int] | Tensor:
    """`definition.sums`: as numbers from the host, or as `[2]` on a device, not waited for."""
    if tensor.is_cpu:
        kernel = native.kernel()
        if kernel is not None:
            return kernel.sums(tensor)
        first, second = definition.sums(tensor).tolist()
        return first, second
    if tensor.device.type != "cuda":
        return definition.sums(tensor)
    with devices.current(tensor.device):  # Triton launches there
        made: Tensor = (_on_gpu(tensor.device) or definition).sums(tensor)
    return made


@functools.cache
def _on_gpu(device: torch.device) -> Any:
    """The Triton kernel, if it returns the sums of the definition on this device."""
    if not wanted():
        return None
    try:
        from flashquant.schemes.fingerprints import fused
        from flashquant.schemes.fused import COMPILE_ERRORS
    except ImportError as missing:  # Triton comes with torch for CUDA
        logger.info("digests on %s are taken by torch: %s", device, missing)
        return None
    try:
        strange = fused.difference(device)
    except COMPILE_ERRORS as failure:
        logger.error("digests on %s are taken by torch, more slowly: %s", device, failure)
        return None
    if strange is None:
        return fused
    logger.error(
        "the sums of %s on %s differ from their definition, so torch takes digests instead. "
        "Please report it with the output of `flashquant doctor`.",
        strange,
        torch.cuda.get_device_name(device),
    )
    return None
