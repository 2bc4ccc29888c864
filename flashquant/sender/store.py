"""A folder of bundles, from which an engine that missed some catches up.

    00000001-whole-<digest>.safetensors       a policy
    00000002-<base>-<digest>.safetensors      what changed from one policy to another

One writer, any number of readers, over whatever shares a folder: each file is written whole or not
at all, and its name says what it leads from and to. Only ordinary files count: what a link leads
to is not of this folder, and a pipe would never be read to its end.
"""

from __future__ import annotations

import heapq
import itertools
import logging
import os
import re
import shutil
from collections.abc import Collection, Sequence
from pathlib import Path
from typing import Final, NamedTuple

from flashquant.errors import ReloadError, StaleBase
from flashquant.sender.delta import Delta

logger = logging.getLogger(__name__)

_WHOLE: Final = "whole"
_NAME: Final = re.compile(r"([0-9]{8,})-(whole|[0-9a-f]{32})-([0-9a-f]{32})\.safetensors")
_HALF: Final = re.compile(rf"\.{_NAME.pattern}\..+")  # where a writer was, as `Delta.save` names it


class _Stored(NamedTuple):
    """One bundle of a folder."""

    number: int
    path: Path
    base: str | None
    digest: str


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

        Raises:
            OSError: it could not be written; the folder is as it was.
            ReloadError: another writer has put a bundle there meanwhile; this one is not there.

        """
        newest = max(self._all(), default=None)
        number = 1 if newest is None else newest.number + 1
        base, header = delta.header.base or _WHOLE, delta.header
        if header.base and newest is not None and newest.digest != header.base:
            logger.warning(
                "a bundle is put into %s that starts from policy %s, and %s is the newest there: "
                "one was left out, or there is another writer",
                self.folder,
                header.base,
                newest.digest,
            )
        path = self.folder / f"{number:08d}-{base}-{header.digest}.safetensors"
        delta.save(path)
        if other := next((s for s in self._all() if s.number == number and s.path != path), None):
            path.unlink(missing_ok=True)
            raise ReloadError(
                f"another writer has put {other.path.name} into {self.folder} just now. Bundles "
                "of one folder come from one sender: give each its own."
            )
        return path

    @property
    def newest(self) -> str | None:
        """The digest of the newest policy; None of an empty folder."""
        newest = max(self._all(), default=None)
        return None if newest is None else newest.digest

    def path_from(self, digest: str | None, without: Collection[Path] = ()) -> list[Path]:
        """The bundles that bring an engine to the newest policy, in order; as few bytes as can be.

        For each of them, `flashquant.apply_delta(target, path)`.

        Args:
            digest: of the policy that it serves (`flashquant.manifest(target).digest`); None where
                nobody knows.
            without: bundles that an engine has refused (`BrokenDelta`): it goes by others.

        Raises:
            StaleBase: none of what is there leads to it.

        """
        every = self._all()
        while True:
            try:
                return self._path(every, digest, without)
            except StaleBase:
                before, every = every, self._all()
                if set(every) == set(before):  # else another process wrote and pruned meanwhile
                    raise

    def _path(
        self, every: Sequence[_Stored], digest: str | None, without: Collection[Path] = ()
    ) -> list[Path]:
        newest = max(every, default=None)
        if newest is None or newest.digest == digest:
            return []
        found = _cheapest([s for s in every if s.path not in without], digest, newest.digest)
        if found is None:
            raise StaleBase(
                f"no bundles in {self.folder} lead from policy {digest} to {newest.digest}: some "
                "are missing, and there is no whole one. Put one there (`Sender.snapshot()`)."
            )
        known = digest is not None and any(digest in (s.base, s.digest) for s in every)
        if known and found[0].base is None:
            logger.warning(
                "%s takes an engine from policy %s to %s by a whole bundle: the deltas in between "
                "are larger, or some are missing",
                self.folder,
                digest,
                newest.digest,
            )
        return [stored.path for stored in found]

    def prune(self, serving: Collection[str | None]) -> list[Path]:
        """Remove what no engine needs any more to get to the newest policy, and what writers that
        were killed have left.

        Args:
            serving: the digests of the policies that live engines serve. What a new engine needs,
                and one that is at none of these, stays too.

        Returns:
            The bundles that were removed.

        Raises:
            StaleBase: as `path_from`; nothing is removed.

        """
        every = sorted(self._all())
        needed = {path for digest in {None, *serving} for path in self._path(every, digest)}
        needed |= {stored.path for stored in every[-1:]}  # it says which policy is the newest
        spare = [stored.path for stored in every if stored.path not in needed]
        for path in spare:
            path.unlink(missing_ok=True)
        for path in self.folder.iterdir() if every else ():
            left = _HALF.fullmatch(path.name)
            if left is not None and int(left[1]) <= every[-1].number:  # not that being written
                shutil.rmtree(path, ignore_errors=True)
        return spare

    def _all(self) -> list[_Stored]:
        """One look at the folder, in no order."""
        with os.scandir(self.folder) as entries:
            return [found for entry in entries if (found := _parsed(entry)) is not None]


def _parsed(entry: os.DirEntry[str]) -> _Stored | None:
    """What the name of a file says; None of what is no bundle, or not a whole one yet."""
    match = _NAME.fullmatch(entry.name)
    if match is None or not entry.is_file(follow_symlinks=False):
        return None
    number, base, digest = match.groups()
    return _Stored(int(number), Path(entry.path), None if base == _WHOLE else base, digest)


def _cheapest(
    bundles: Collection[_Stored], start: str | None, goal: str
) -> tuple[_Stored, ...] | None:
    """The bundles of the fewest bytes that lead from a policy, or from none, to another."""
    by_base: dict[str | None, list[tuple[int, _Stored]]] = {}
    for stored in sorted(bundles):
        try:
            size = stored.path.lstat().st_size
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
