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
_PATIENCE = 1.0  # seconds; as it is, one would wait for another rank for ten minutes

# Each breaks the promise, on the rank that does so.
BROKEN: dict[str, tuple[type, str, Callable[..., Any]]] = {
    "the undo log is thrown away": (UndoLog, "restore", UndoLog.forget),
    "nobody waits for the others": (Ballot, "agree", lambda ballot, number: None),
}


class UnderFire(Pushed):
    """Methods of a worker (`worker_extension_cls`)."""

    _armed: tuple[ExitStack, Callable[[], Any]] | None = None

    def be_impatient(self: Any) -> int:
        """Wait no longer for another rank than a test does; which rank this is."""
        session = session_of(self.get_model())
        session.transactions._ballot._patience = _PATIENCE
        return int(session.rank)

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
            does: `raises`, `is late` or `dies`.
            seconds: by which it is late.

        """
        if session_of(self.get_model()).rank != rank:
            return

        def strike() -> None:
            if does == "dies":
                os.kill(os.getpid(), signal.SIGKILL)
            if does == "is late":
                time.sleep(seconds)
            else:
                raise _ERRORS[at % len(_ERRORS)]("injected")

        stack = ExitStack()
        self._armed = (stack, stack.enter_context(faults.struck(POINTS[point], at, strike)))

    def disarm(self: Any) -> Any:
        """What was counted, or reached; None where nothing was armed."""
        if self._armed is None:
            return None
        (stack, told), self._armed = self._armed, None
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
