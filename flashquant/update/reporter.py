"""Status and reports of a session: the state of the model, what an update did, what was refused."""

from __future__ import annotations

import logging
import time
from collections.abc import Iterable, Iterator
from collections.abc import Set as AbstractSet
from contextlib import contextmanager
from itertools import chain

from flashquant.plan import Planner
from flashquant.schemes import digest
from flashquant.update.completeness import Completeness
from flashquant.update.engine import Engine
from flashquant.update.report import ReloadReport
from flashquant.update.state import Update
from flashquant.update.status import Refusal, Status
from flashquant.update.ties import Ties
from flashquant.update.transaction import Transactions
from flashquant.update.wording import some_of

logger = logging.getLogger(__name__)


class Reporter:
    """Makes the status and the reports of one model.

    Args:
        engine: the model.
        planner: where its names land.
        completeness: what has come, and what has not.
        ties: names that wait for the parameter that they are tied to.
        transactions: its version and health.

    """

    def __init__(
        self,
        engine: Engine,
        planner: Planner,
        completeness: Completeness,
        ties: Ties,
        transactions: Transactions,
    ) -> None:
        self._engine, self._planner, self._ties = engine, planner, ties
        self._completeness, self._transactions = completeness, transactions
        self._refusal: Refusal | None = None
        self._ignored: set[str] = set()

    @contextmanager
    def refusing(self, names: AbstractSet[str] = frozenset()) -> Iterator[None]:
        """Note what is refused in the block: the caller that gets the error may not pass it on.

        Args:
            names: of a push; they may become more in the block.

        """
        before = self._transactions.current
        was_over = before is not None and before.over  # what failed has been said
        try:
            yield
        except BaseException as failure:
            if before is None and names:  # a bracket takes everything back, and owes nothing
                self._completeness.note_refused(names)
            if isinstance(failure, Exception) and not was_over:
                self._note_refusal(failure, names)
            raise

    def _note_refusal(self, failure: Exception, names: AbstractSet[str]) -> None:
        self._refusal = Refusal(
            what=f"{type(failure).__name__}: {failure}",
            when=time.time(),
            names=tuple(sorted(names)),
            version=self._transactions.version,
        )
        logger.error(
            "refused and rolled back: %s%s",
            self._refusal.what,
            f" (with it: {some_of(self._refusal.names)})" if names else "",
        )

    def note_ignored(self, names: Iterable[str]) -> None:
        """The engine's loader dropped these; say once of each that the checkpoint had none such."""
        new = {name for name in names if not self._planner.expects(name)} - self._ignored
        self._ignored |= new
        if new:
            logger.warning(
                "the engine's loader drops %s, of which its checkpoint knows nothing: what they "
                "hold is not served",
                some_of(sorted(new)),
            )

    def status(self, digests: dict[str, str], foreign: tuple[str, ...]) -> Status:
        """How the model stands.

        Args:
            digests: of what the kernels read, by name; none while it is asleep.
            foreign: live parameters that were modified outside flashquant.

        """
        placed: dict[str, list[str]] = {"direct": [], "staged": [], "fallback": []}
        replayed = self._planner.replayed
        for layer in self._engine.layers:
            placement = layer.placement if replayed.isdisjoint(layer.targets) else "fallback"
            placed[placement].append(layer.name)
        health, whole = self._transactions.serving, digest(digests) if digests else None
        return Status(
            scheme=self._engine.scheme,
            version=self._transactions.version,
            torn=health.torn,
            asleep=health.asleep,
            pending={**self._ties.waiting(), **self._completeness.waiting()},
            dropped=dict(self._completeness.dropped),
            refused=tuple(sorted(self._completeness.refused)),
            refusal=self._refusal,
            digest=whole,
            ranks=(whole,),
            parameters=digests,
            foreign=foreign,
            direct=tuple(placed["direct"]),
            staged=tuple(placed["staged"]),
            fallback=tuple(placed["fallback"]),
            in_bf16=self._engine.in_bf16,
            overrides=self._engine.overrides,
            quiet=self._transactions.quiet,
        )

    def report(self, update: Update, now: float, *, pause: float) -> ReloadReport:
        """What an update did that was committed at `now`, a time of `time.perf_counter`."""
        seconds, statistics = now - update.start, update.statistics
        waiting = self._completeness.waiting(update.waiting.values())
        return ReloadReport(
            version=self._transactions.version,
            tensors=statistics.tensors,
            bytes_in=statistics.bytes_in,
            bytes_out=statistics.bytes_out,
            undo_bytes=update.undo.bytes,
            undo_cache_bytes=update.undo.cache_bytes,
            seconds=seconds,
            prepare_seconds=seconds - pause,
            pause_seconds=pause,
            phases=dict(statistics.seconds),
            layers=tuple(sorted(update.committed)),
            ignored=tuple(statistics.ignored),
            pending=tuple(chain.from_iterable(waiting.values())),
            kept=statistics.kept,
            digest=None,
            ranks=(None,),
            drift=dict(statistics.drift),
        )
