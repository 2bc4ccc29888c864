"""One thread at a time works on the weights of an engine.

An engine in the caller's own process can be reached from all of its threads. What another one is in
the middle of was not left by anybody: it is neither rolled back under its feet nor generated from.
"""

from __future__ import annotations

import threading
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Final

from flashquant.errors import ReloadError

ELSEWHERE: Final = (
    "another thread of this process is in the middle of an update of this engine, which goes on. "
    "Wait for it: let the threads that push, generate, or put the engine to sleep take turns."
)


class Turn:
    """Whose call it is at the moment; calls of one thread may contain each other."""

    def __init__(self) -> None:
        self._lock = threading.RLock()

    @property
    def elsewhere(self) -> bool:
        """Whether another thread is in the middle of a call."""
        mine = self._lock.acquire(blocking=False)
        if mine:
            self._lock.release()
        return not mine

    @contextmanager
    def taken(self) -> Iterator[None]:
        """It is this thread's while the block runs.

        Raises:
            ReloadError: it is another one's.

        """
        mine = False
        try:
            mine = self._lock.acquire(blocking=False)
            if not mine:
                raise ReloadError(ELSEWHERE)
            yield
        finally:
            if mine:
                self._lock.release()
