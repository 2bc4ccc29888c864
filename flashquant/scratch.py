"""Memory that is used over and over: its pages are taken once, and it stays in the cache."""

from __future__ import annotations

import torch
from torch import Tensor


class Scratch:
    """What one call leaves there is good until the next."""

    def __init__(self) -> None:
        self._chunk: Tensor | None = None

    def room(self, nbytes: int, device: torch.device) -> Tensor:
        """So many bytes, uint8, whatever they hold."""
        chunk = self._chunk
        if chunk is None or len(chunk) < nbytes or chunk.device != device:
            chunk = self._chunk = torch.empty(nbytes, dtype=torch.uint8, device=device)
        return chunk[:nbytes]
