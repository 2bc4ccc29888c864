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
    """That of the engine's steps: the current one when the session is made, until steps come on
    another.

    vLLM puts a process on a stream of its own when it is first asked for the current one
    (`vllm.utils.torch_utils.current_stream`), which may be in its first step.

    Args:
        device: of the weights. On the host, nothing is done.

    """

    def __init__(self, device: torch.device) -> None:
        self._device = device
        self._own = torch.cuda.current_stream(device) if device.type == "cuda" else None

    def step(self) -> None:
        """A step of the engine is next, on the current stream."""
        if self._own is None or self._own == (steps := torch.cuda.current_stream(self._device)):
            return
        steps.wait_stream(self._own)
        self._own = steps

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
