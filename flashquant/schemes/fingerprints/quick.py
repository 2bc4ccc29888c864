"""The sums by the fastest implementation that takes this tensor."""

from __future__ import annotations

import functools
import logging
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from flashquant.schemes import devices
from flashquant.schemes.fingerprints import definition, native
from flashquant.schemes.native import wanted

logger = logging.getLogger(__name__)


def sums(tensors: Sequence[Tensor]) -> list[tuple[int, int]] | Tensor:
    """`definition.sums` of contiguous tensors on one device: as numbers from the host; else as
    `[len(tensors), 2]` on the device, not waited for."""
    device = tensors[0].device
    if device.type == "cpu":
        return [_on_host(tensor) for tensor in tensors]
    if device.type == "cuda" and (fused := _on_gpu(device)) is not None:
        with devices.current(device):  # Triton launches there
            made: Tensor = fused.sums(tensors)
            return made
    return torch.stack([definition.sums(tensor) for tensor in tensors])


def _on_host(tensor: Tensor) -> tuple[int, int]:
    kernel = native.kernel()
    if kernel is not None:
        return kernel.sums(tensor)
    first, second = definition.sums(tensor).tolist()
    return first, second


def blocks(tensor: Tensor) -> Tensor:
    """`definition.blocks` of a contiguous tensor in host memory."""
    kernel = native.kernel()
    return definition.blocks(tensor) if kernel is None else kernel.blocks(tensor)


def closed(blocks: Tensor) -> tuple[int, int]:
    """`definition.closed` of all blocks of a tensor, in host memory."""
    kernel = native.kernel()
    if kernel is not None:
        return kernel.closed(blocks)
    first, second = definition.closed(blocks).tolist()
    return first, second


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
