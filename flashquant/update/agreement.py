"""All workers commit, or none does: one ballot a bracket, in a store they share.

    ready      every check of a worker has passed; it could stand, or go back
    decision   written once, by whoever can tell first; everybody obeys it

A worker that fails writes the decision itself and does not wait. One that is
ready waits for the others, and looks whether they are still alive. Decisions stay in
the store, some 200 bytes an update: a slow worker may come for one that is rounds old.

Two-phase commit, with the store as coordinator (Gray and Reuter, 1992, chapter 10).
"""

from __future__ import annotations

import json
import logging
import time

from torch.distributed import DistError
from torch.distributed.distributed_c10d import Store

from flashquant.errors import PeerFailed, ReloadError, WorkerLost
from flashquant.update.members import Member

logger = logging.getLogger(__name__)

_COMMIT = "commit"
_LOOK_EVERY = 1.0  # seconds between two looks at the other processes
_LONGEST_NAP = 0.05  # seconds between two looks into the store


class Ballot:
    """One worker's voice in the decisions of its engine.

    Args:
        store: shared by the workers of one engine, and only by them.
        rank: of this worker among them.
        size: how many there are.
        lockstep: one front end calls all workers, and waits for every answer before it
            calls again. So whoever is in a later round tells a worker that it missed some.
            Where each rank has a program of its own, one that failed may be rounds ahead,
            and the others must follow it through every one.
        patience: seconds that a worker that is ready waits for one that is alive.

    """

    def __init__(
        self, store: Store, rank: int, size: int, *, lockstep: bool, patience: float = 600.0
    ) -> None:
        self.rank = rank
        self._lockstep = lockstep
        self._store, self._size, self._patience = store, size, patience
        self._round = 0
        store.set(f"member/{rank}", json.dumps(Member.here(rank)))

    @property
    def next(self) -> int:
        """The round that `open` enters, or an earlier one, where this worker has missed some."""
        return self._round + 1

    def open(self) -> int:
        """Enter the next round; in lockstep, the one that others are in."""
        self._round += 1
        if self._lockstep:
            latest = int(self._store.get("latest")) if self._store.check(["latest"]) else 0
            self._round = max(self._round, latest)
            self._store.set("latest", str(self._round))
        return self._round

    def agree(self, round: int) -> None:
        """Vote to commit, and wait until all have; from then on the update is committed everywhere.

        Raises:
            PeerFailed: another worker refused, so every one goes back.
            WorkerLost: another worker's process has ended.

        """
        try:
            decision = self._wait(round)
        except DistError as broken:
            raise WorkerLost(
                f"rank {self.rank} cannot reach the other workers any more ({broken}), so it "
                "rolled its update back. Restart the engine."
            ) from broken
        if decision != _COMMIT:
            raise _refusal(decision)

    def refuse(self, round: int, failure: BaseException) -> bool:
        """Vote to go back, unless all have agreed to commit already.

        Also of a round that this worker could not enter: for it, too, that one is over then.

        Returns:
            Whether this worker must go back, as all others will.

        """
        self._round = max(self._round, round)
        kind = "lost" if isinstance(failure, WorkerLost) else "refused"
        why = f"{type(failure).__name__}: {failure}" if str(failure) else type(failure).__name__
        try:
            return self._decide(round, kind, self.rank, why) != _COMMIT
        except DistError:
            logger.warning("rank %d rolls back, and cannot tell the other workers", self.rank)
            return True

    def _wait(self, round: int) -> str:
        votes = [f"{round}/ready/{rank}" for rank in range(self._size)]
        self._store.set(votes[self.rank], "")
        start = looked = time.monotonic()
        nap = 0.0005
        while (decision := self._decision(round)) is None:
            now = time.monotonic()
            if self._store.check(votes):
                return self._decide(round, _COMMIT)
            if now - looked >= _LOOK_EVERY:
                looked = now
                self._look(round, votes, now - start)
            time.sleep(nap)
            nap = min(2 * nap, _LONGEST_NAP)
        return decision

    def _look(self, round: int, votes: list[str], waited: float) -> None:
        """Decide to go back when one who has not voted is dead, or too slow."""
        for rank, vote in enumerate(votes):
            if self._store.check([vote]) or not self._store.check([f"member/{rank}"]):
                continue
            if Member(*json.loads(self._store.get(f"member/{rank}"))).gone:
                self._decide(round, "lost", rank, "its process has ended")
            elif waited > self._patience:
                self._decide(round, "refused", rank, f"not ready after {self._patience:.0f} s")

    def _decision(self, round: int) -> str | None:
        key = f"{round}/decision"
        return self._store.get(key).decode() if self._store.check([key]) else None

    def _decide(self, round: int, *verdict: str | int) -> str:
        """Write the decision, unless there is one already; return the one that holds."""
        wanted = _COMMIT if verdict == (_COMMIT,) else json.dumps(verdict)
        held: bytes = self._store.compare_set(f"{round}/decision", "", wanted)
        return held.decode()


def _refusal(decision: str) -> ReloadError:
    kind, rank, why = json.loads(decision)
    if kind == "lost":
        return WorkerLost(
            f"rank {rank} was lost in the middle of an update ({why}); the others rolled it back. "
            "Restart the engine."
        )
    return PeerFailed(
        f"rank {rank} did not commit this update ({why}), so every worker rolled it back; "
        "the old weights are served."
    )
