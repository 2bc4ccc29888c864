"""Where commands print their tables."""

from __future__ import annotations

import sys
from typing import Final

from rich.console import Console

_WIDE: Final = 200


def console() -> Console:
    """As wide as the terminal; wide where a pipe or a file takes it, so that names stay whole."""
    return Console(width=None if sys.stdout.isatty() else _WIDE)
