"""What several workers say of one engine, as one answer.

They hold shards of the same layers, or, in a pipeline, layers of their own.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from itertools import chain
from typing import TypeVar

from flashquant.schemes import digest

Said = TypeVar("Said")


def digest_of_ranks(ranks: Sequence[str | None]) -> str | None:
    """One digest of a whole engine: that of its only worker, or one of all of theirs."""
    if len(ranks) == 1:
        return ranks[0]
    known = {str(rank): part for rank, part in enumerate(ranks) if part is not None}
    return digest(known) if len(known) == len(ranks) else None


def union(parts: Iterable[Iterable[str]]) -> tuple[str, ...]:
    """Each name once, in the order in which it is met."""
    return tuple(dict.fromkeys(chain.from_iterable(parts)))


def merged(parts: Iterable[Mapping[str, Said]]) -> dict[str, Said]:
    """What is said of each name, by the first that knows it."""
    said: dict[str, Said] = {}
    for part in parts:
        said |= {name: value for name, value in part.items() if name not in said}
    return said
