"""What `under_fire` asks of a worker: to fail, to be late or to die, at one call of a function.

vLLM imports `UnderFire` into the worker's process before it loads.
"""

from __future__ import annotations

import os
import signal
import time
from collections.abc import Callable
from contextlib import ExitStack
from typing import Any
from unittest import mock

from flashquant.patches.seams.loading import session_of
from flashquant.update import Ballot, UndoLog
from tests.engine import faults
from tests.engine.faults import Point
from tests.engine.programs.on_rank import Pushed

POINTS = (
    *faults.CALLS,
    Point(Ballot, Ballot.open, "before"),
    Point(Ballot, Ballot.open, "after"),
    Point(Ballot, Ballot.agree, "before"),
    Point(Ballot, Ballot.agree, "after"),
)
# KeyboardInterrupt would end the process of a worker, as SIGKILL does.
_ERRORS = (MemoryError, RuntimeError, OSError)
_PATIENCE = 1.0  # seconds that a rank waits for one that is too late, in place of ten minutes


def _vote(ballot: Ballot, number: int) -> None:
    ballot._store.set(f"{number}/ready/{ballot.rank}", "")


# Each breaks the promise, on the rank that does so.
BROKEN: dict[str, tuple[type, str, Callable[..., Any]]] = {
    "the undo log is thrown away": (UndoLog, "restore", UndoLog.forget),
    "nobody waits for the others": (Ballot, "agree", _vote),
}


class UnderFire(Pushed):
    """Methods of a worker (`worker_extension_cls`)."""

    _armed: tuple[ExitStack, Callable[[], Any]]

    def count(self: Any) -> None:
        """Count the calls of every function from now on; `disarm` tells them."""
        stack = ExitStack()
        counts = [stack.enter_context(faults.counted(point)) for point in POINTS]
        self._armed = (stack, lambda: [count() for count in counts])

    def arm(self: Any, rank: int, point: int, at: int, does: str, seconds: float) -> None:
        """Let one rank fail at one call of a function; `disarm` tells whether it came there.

        Args:
            rank: of all; the others do nothing.
            point: its place in `POINTS`.
            at: which call of it.
            does: `raises`, `is late`, `is too late` or `dies`.
            seconds: by which it is late.

        """
        session, stack = session_of(self.get_model()), ExitStack()
        self._armed = (stack, lambda: False)
        if does == "is too late":
            ballot = session.transactions._ballot
            stack.enter_context(mock.patch.object(ballot, "_patience", _PATIENCE))
        if session.rank != rank:
            return

        def strike() -> None:
            if does == "dies":
                os.kill(os.getpid(), signal.SIGKILL)
            if seconds:
                time.sleep(seconds)
            else:
                raise _ERRORS[at % len(_ERRORS)]("injected")

        self._armed = (stack, stack.enter_context(faults.struck(POINTS[point], at, strike)))

    def disarm(self: Any) -> Any:
        """What was counted, or whether it was reached."""
        stack, told = self._armed
        stack.close()
        return told()

    def break_promise(self: Any, rank: int, how: str) -> None:
        """Make a rank do something wrong, until `mend`."""
        if session_of(self.get_model()).rank == rank:
            self._broken = ExitStack()
            self._broken.enter_context(mock.patch.object(*BROKEN[how]))

    def mend(self: Any) -> None:
        """No more."""
        vars(self).pop("_broken", ExitStack()).close()
