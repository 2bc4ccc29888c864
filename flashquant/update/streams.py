"""All of a session's work on one stream of its GPU, whichever one its callers are on.

vLLM's packed NCCL transfer hands each chunk over on another stream than the one before, and waits
for neither. But chunks have a layer in common: its rows come with one and it goes live with the
next, its old values are copied by one and overwritten by the next, and memory that one has
allocated another has read before it is free. On one stream all of that is in order.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import torch


class OneStream:
    """The stream that was current when the session was made: that of the engine's steps.

    Args:
        device: of the weights. On the host, nothing is done.

    """

    def __init__(self, device: torch.device) -> None:
        self._device = device
        self._own = torch.cuda.current_stream(device) if device.type == "cuda" else None

    @contextmanager
    def joined(self) -> Iterator[None]:
        """While this lasts, that stream is the current one.

        It begins after what the caller's stream has been given, and the caller's stream goes on
        after what it is given here: neither is waited for by the host.
        """
        if self._own is None or self._own == (callers := torch.cuda.current_stream(self._device)):
            yield
            return
        self._own.wait_stream(callers)
        try:
            with torch.cuda.stream(self._own):
                yield
        finally:
            callers.wait_stream(self._own)
