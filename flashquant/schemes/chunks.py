"""Row ranges that keep an fp32 temporary small, whatever the size of the weight."""

from __future__ import annotations

from collections.abc import Iterator

from torch import Tensor

# 2 MiB of fp32: stays in the cache of one core, so the passes over a chunk after
# the first one do not go to memory again.
_CHUNK_ELEMENTS = 512 * 1024
# 64 MiB of fp32, where there is no such cache: a pass takes several times as long as its launch.
_CHUNK_ELEMENTS_ON_A_DEVICE = 16 * 1024 * 1024


def row_chunks(weight: Tensor) -> Iterator[slice]:
    """Slices over the rows of `[N, K]`: half a million elements each, or 16 on a device."""
    on_the_host = weight.device.type == "cpu"
    elements = _CHUNK_ELEMENTS if on_the_host else _CHUNK_ELEMENTS_ON_A_DEVICE
    rows = max(1, elements // max(1, weight.shape[-1]))
    return (slice(start, start + rows) for start in range(0, weight.shape[0], rows))
