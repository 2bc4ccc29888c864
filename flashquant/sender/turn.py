"""One thread after the other, and no call within a call."""

from __future__ import annotations

import threading
from types import TracebackType

from flashquant.errors import ReloadError


class Turn:
    """Of one object, whose copies each have their own."""

    def __init__(self) -> None:
        self._lock, self._taken = threading.RLock(), False

    def __enter__(self) -> None:
        """Raises:
        ReloadError: this thread has it already.

        """
        self._lock.acquire()
        if self._taken:
            self._lock.release()
            raise ReloadError(
                "a sender makes one bundle at a time, and was called by what yields the weights of "
                "another one. Call it before or after, or make a second Sender."
            )
        self._taken = True

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self._taken = False
        self._lock.release()

    def __reduce__(self) -> tuple[type[Turn], tuple[()]]:
        return type(self), ()
