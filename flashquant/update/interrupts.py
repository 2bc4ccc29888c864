"""A few lines that must not be cut in two by Ctrl-C, or by an alarm that a caller has set.

Putting the old weights back, or letting the new ones stand, is a handful of
steps; a signal between two of them would leave neither.
"""

from __future__ import annotations

import signal
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from types import FrameType

Handler = Callable[[int, FrameType | None], object]

# What raises in other programs: Ctrl-C, torch's elastic agent, timeouts, schedulers of clusters.
_SIGNALS = (
    signal.SIGINT,
    signal.SIGTERM,
    signal.SIGHUP,
    signal.SIGQUIT,
    signal.SIGALRM,
    signal.SIGUSR1,
    signal.SIGUSR2,
)


@contextmanager
def uninterrupted() -> Iterator[None]:
    """Hold back signals while the block runs, then let their handlers have them.

    Only Python handlers are held back: they are what raises in the middle of a
    statement. Without effect outside the main thread, where Python runs none.
    """
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    held: list[tuple[int, FrameType | None]] = []
    handlers = {number: signal.getsignal(number) for number in _SIGNALS}
    kept: dict[int, Handler] = {n: handler for n, handler in handlers.items() if callable(handler)}
    for number in kept:
        signal.signal(number, lambda number, frame: held.append((number, frame)))
    try:
        yield
    finally:
        for number, handler in kept.items():
            signal.signal(number, handler)
        for number, frame in held:
            kept[number](number, frame)
