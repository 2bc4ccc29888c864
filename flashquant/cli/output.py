"""Where commands print their tables, and how far they are."""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Final

from rich.console import Console
from rich.progress import Progress, TaskID

_WIDE: Final = 200


def console() -> Console:
    """As wide as the terminal; wide where a pipe or a file takes it, so that names stay whole."""
    return Console(width=None if sys.stdout.isatty() else _WIDE)


@contextmanager
def bars() -> Iterator[Callable[[str, float], None]]:
    """A bar a phase, on stderr: to be called with the phase, and which part of it is done."""
    with Progress(console=Console(stderr=True), transient=True) as progress:
        phases: dict[str, TaskID] = {}

        def note(phase: str, done: float) -> None:
            if phase not in phases:
                phases[phase] = progress.add_task(phase, total=1.0)
            progress.update(phases[phase], completed=done)

        yield note
