"""How reports, states and errors name things: a few names of many, digests in short."""

from __future__ import annotations

from collections.abc import Iterable

_NAMES_SHOWN = 3
_DIGEST_SHOWN = 12


def shortened(whole: str) -> str:
    """As much of a digest as tells it from another."""
    return whole[:_DIGEST_SHOWN]


def some_of(names: Iterable[str]) -> str:
    """The first few names, and how many more there are."""
    every = tuple(names)
    shown = ", ".join(every[:_NAMES_SHOWN])
    hidden = len(every) - _NAMES_SHOWN
    return f"{shown} and {hidden} more" if hidden > 0 else shown
