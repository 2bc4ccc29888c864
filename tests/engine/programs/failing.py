"""Faults that a program sends to the workers of its engine, in whatever process they are."""

from __future__ import annotations

import os
import signal
import time
from collections.abc import Callable
from typing import Any

_LAYER = 5  # in the middle of a tiny model


def fail_in_the_middle(worker: Any, *, rank: int, dies: bool) -> None:
    """Make one layer of a worker run out of memory as it goes live, once, or end its process."""
    from flashquant.patches.seams.loading import session_of

    session = session_of(worker.get_model())
    if session.rank != rank:
        return
    layer = session._engine.layers[_LAYER]

    def failing(name: str) -> Callable[..., int]:
        def call(*args: Any) -> int:
            del layer.commit, layer.refresh
            if dies:
                os.kill(os.getpid(), signal.SIGKILL)
            getattr(layer, name)(*args)
            raise MemoryError("injected")

        return call

    layer.commit, layer.refresh = failing("commit"), failing("refresh")


def fail_at_the_end(worker: Any) -> None:
    """Make the next update of a worker fail when all of it has come, once."""
    from flashquant.patches.seams.loading import session_of

    pipeline = session_of(worker.get_model())._pipeline

    def failing(*_: Any) -> None:
        del pipeline.finish
        raise MemoryError("injected")

    pipeline.finish = failing


def raised_by(call: Callable[[], object]) -> tuple[str, str, float]:
    """The class and the words of what a call raises, and the seconds until it did."""
    began = time.monotonic()
    try:
        call()
    except Exception as failure:  # whatever it is, the test looks at it
        return type(failure).__name__, str(failure), time.monotonic() - began
    return "nothing", "", time.monotonic() - began
