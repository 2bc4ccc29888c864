"""A folder of bundles, from which an engine that missed some catches up.

    00000001-whole-<digest>.safetensors       a policy
    00000002-<base>-<digest>.safetensors      what changed from one policy to another

One writer, any number of readers, over whatever shares a folder: each file is written whole or not
at all, and its name says what it leads from and to.
"""

from __future__ import annotations

import heapq
import itertools
import logging
import os
import re
from collections.abc import Collection, Iterable
from operator import attrgetter
from pathlib import Path
from typing import Final, NamedTuple

from flashquant.errors import StaleBase
from flashquant.sender.delta import Delta

logger = logging.getLogger(__name__)

_WHOLE: Final = "whole"
_NAME: Final = re.compile(r"(\d{8,})-(whole|[0-9a-f]{32})-([0-9a-f]{32})\.safetensors")


class _Stored(NamedTuple):
    """One bundle of a folder."""

    number: int
    base: str | None
    digest: str
    path: Path


class BundleStore:
    """The bundles in a folder.

    Args:
        folder: made if it is not there.

    """

    def __init__(self, folder: str | os.PathLike[str]) -> None:
        self.folder = Path(folder)
        self.folder.mkdir(parents=True, exist_ok=True)

    def put(self, delta: Delta) -> Path:
        """Add a bundle: its policy is the newest from now on.

        Put a whole one in (`Sender.snapshot()`) now and then: it is where an engine starts that is
        new, or has missed more than is worth reading.
        """
        number = max((stored.number for stored in self._all()), default=0) + 1
        base = _WHOLE if delta.header.base is None else delta.header.base
        path = self.folder / f"{number:08d}-{base}-{delta.header.digest}.safetensors"
        delta.save(path)
        return path

    @property
    def newest(self) -> str | None:
        """The digest of the newest policy; None of an empty folder."""
        newest = max(self._all(), key=attrgetter("number"), default=None)
        return None if newest is None else newest.digest

    def path_from(self, digest: str | None) -> list[Path]:
        """The bundles that bring an engine to the newest policy, in order; as few bytes as can be.

        For each of them, `flashquant.apply_delta(target, path)`.

        Args:
            digest: of the policy that it serves (`flashquant.manifest(target).digest`); None where
                nobody knows.

        Raises:
            StaleBase: none of what is there leads to it.

        """
        newest = self.newest
        if newest is None or newest == digest:
            return []
        found = _cheapest(self._all(), digest, newest)
        if found is None:
            raise StaleBase(
                f"no bundles in {self.folder} lead from policy {digest} to {newest}: some are "
                "missing, and there is no whole one. Put one there (`Sender.snapshot()`)."
            )
        known = digest is not None and any(digest in (s.base, s.digest) for s in self._all())
        if known and found[0].base is None:
            logger.warning(
                "%s takes an engine from policy %s to %s by a whole bundle: the deltas in between "
                "are larger, or some are missing",
                self.folder,
                digest,
                newest,
            )
        return [stored.path for stored in found]

    def prune(self, serving: Collection[str | None]) -> list[Path]:
        """Remove what no engine needs any more to get to the newest policy.

        Args:
            serving: the digests of the policies that live engines serve. What a new engine needs,
                and one that is at none of these, stays too.

        Returns:
            The files that were removed.

        Raises:
            StaleBase: as `path_from`; nothing is removed.

        """
        needed = {path for digest in {None, *serving} for path in self.path_from(digest)}
        spare = [stored.path for stored in self._all() if stored.path not in needed]
        for path in spare:
            path.unlink(missing_ok=True)
        return sorted(spare)

    def _all(self) -> list[_Stored]:
        return [stored for path in self.folder.iterdir() if (stored := _parsed(path)) is not None]


def _parsed(path: Path) -> _Stored | None:
    """What the name of a file says; None of what is no bundle, or not a whole one yet."""
    match = _NAME.fullmatch(path.name)
    if match is None:
        return None
    number, base, digest = match.groups()
    return _Stored(int(number), None if base == _WHOLE else base, digest, path)


def _cheapest(
    bundles: Iterable[_Stored], start: str | None, goal: str
) -> tuple[_Stored, ...] | None:
    """The bundles of the fewest bytes that lead from a policy, or from none, to another."""
    by_base: dict[str | None, list[tuple[int, _Stored]]] = {}
    for stored in bundles:
        try:
            size = stored.path.stat().st_size
        except FileNotFoundError:  # another process has just pruned it
            continue
        by_base.setdefault(stored.base, []).append((size, stored))
    reached: set[str | None] = set()
    serial = itertools.count()  # ways of the same size are taken as they came
    ways: list[tuple[int, int, str | None, tuple[_Stored, ...]]] = []
    for at in dict.fromkeys((start, None)):
        heapq.heappush(ways, (0, next(serial), at, ()))
    while ways:
        size, _, at, way = heapq.heappop(ways)
        if at == goal:
            return way
        if at in reached:
            continue
        reached.add(at)
        for more, stored in by_base.get(at, ()):
            heapq.heappush(ways, (size + more, next(serial), stored.digest, (*way, stored)))
    return None
