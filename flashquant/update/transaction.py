"""The update under way: committed, or rolled back, whatever interrupts it.

It is noted before anything is touched, busy while a call works on it, and crossed
out when it is committed or has been rolled back. So no interrupt leaves it between the two
for long: whoever comes next finds a busy update, and takes it back.
"""

from __future__ import annotations

import logging
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager

import torch

from flashquant.config.checks import Checks
from flashquant.errors import MovedTensor, ReloadError, TornWeights
from flashquant.update.agreement import Ballot
from flashquant.update.interrupts import uninterrupted
from flashquant.update.reserve import Reserve
from flashquant.update.serving_state import ServingState
from flashquant.update.state import Update
from flashquant.update.streams import OneStream
from flashquant.update.turns import ELSEWHERE, Turn
from flashquant.update.undo import UndoLog

logger = logging.getLogger(__name__)


class Transactions:
    """The updates of one model, one at a time.

    Attributes:
        current: the update under way; a bracket also after it was rolled back, until
            it is closed.
        health: whether what is live may be served and written.
        version: how many updates are committed.
        reserve: the memory of their undo logs.
        turn: of the thread whose call works on one.

    """

    def __init__(
        self,
        ballot: Ballot | None,
        settle: Callable[[Update, bool], None],
        checks: Checks,
        device: torch.device,
    ) -> None:
        """Args:
        ballot: the voice of this worker among several; None where it is the only one.
        settle: called whenever an update is over, with whether it was committed.
        checks: they say after how many seconds without anything new a bracket may be taken back.
        device: of the weights.

        """
        self.current: Update | None = None
        self.serving = ServingState()
        self.version = 0
        self.reserve = Reserve()
        self.turn = Turn()
        self._ballot = ballot
        self._held: float | None = None  # since when
        self._spent: list[UndoLog] = []
        self._settle, self._timeout = settle, checks.bracket_timeout
        self._stream = OneStream(device)

    @property
    def under_way(self) -> bool:
        """Whether there is an update that is neither committed nor rolled back yet."""
        return self.current is not None and not self.current.over

    @property
    def in_bracket(self) -> bool:
        """Whether a bracket is open."""
        return self.current is not None and self.current.bracket and not self.current.over

    @property
    def holds_steps(self) -> bool:
        """Whether an update is under way, here or elsewhere, that may not be generated beside."""
        alone = self.current is not None and self.in_bracket and not self.current.prepares
        return alone or self._held is not None

    def hold(self, held: bool) -> None:
        """Let the engine take no step of a request, whatever is begun, fails or is committed here.

        Others may compute with this engine, and be at another point of the same update.
        """
        self._held = time.monotonic() if held else None

    @contextmanager
    def begin(self, update: Update, first: Callable[[], None]) -> Iterator[None]:
        """Open a bracket; whatever was left of an earlier one is taken back first.

        The block prepares it; if it fails, there is no bracket, and no other worker waits for it.

        Args:
            update: what it will hold.
            first: called when no update is under way any more, and none yet.

        """
        self.take_back_what_was_cut_off()
        if self.current is not None and self.under_way:
            logger.warning("an update was begun and never finished; it is rolled back")
            self._roll_back(self.current, ReloadError("another update began"))
        update.busy = True
        update.round = None if self._ballot is None else self._ballot.next
        try:
            if self._ballot is not None:
                update.round = self._ballot.open()
            with self._stream.joined():
                first()
                self.current = update
                self.serving.check_writable()
                yield
            update.busy = False
        except BaseException as failure:
            self._roll_back(update, failure)
            self.current = None
            raise

    @contextmanager
    def push(self) -> Iterator[Update]:
        """Work on the bracket that is open, or on an update that the end of the block commits."""
        self.take_back_what_was_cut_off()
        update = self.current
        if update is None:
            self.serving.check_writable()
            self.current = update = Update(UndoLog(reserve=self.reserve))
        elif update.over:
            raise ReloadError(
                "this update failed and was rolled back; the old weights are served. Finish it, or "
                "begin a new one, before you push again."
            )
        with self._all_or_nothing(update, commits=not update.bracket):
            yield update

    @contextmanager
    def finish(self) -> Iterator[Update]:
        """Close the bracket: it is committed when the block is done and every worker is ready.

        Raises:
            ReloadError: there is none, or it has been rolled back.
            PeerFailed: another worker refused, so everything is as it was.
            WorkerLost: another worker's process has ended; likewise.

        """
        self.take_back_what_was_cut_off()
        update = self.current
        if update is None or update.over:
            self.current = None
            raise ReloadError(
                "no update is under way: it failed and was rolled back, or it never began"
            )
        try:
            with self._all_or_nothing(update, commits=True):
                yield update
                if self._ballot is not None and update.round is not None:
                    self._ballot.agree(update.round)
        finally:
            if update.over:
                self.current = None

    def check_current(self, begun: Update | None) -> None:
        """Before more comes of an update, or its end: that no other one has taken its place.

        What is pushed where no bracket is open goes live by itself: the rest of one policy among
        the layers of another.

        Args:
            begun: that update.

        Raises:
            ReloadError: it is not the one that was begun last.

        """
        if begun is None or self.current is not begun:
            raise ReloadError(
                "this update is under way no more: it was rolled back when another one began, or "
                "when the engine was put to sleep. Let one trainer wait for the other, and send "
                "this update anew, from its beginning."
            )

    def sweep(self) -> None:
        """Free what prepared updates have left behind."""
        while self._spent:
            self._spent.pop().forget()

    def free(self) -> None:
        """Give back the host memory that is held for the next update's undo log."""
        self.sweep()
        self.reserve.clear()

    def abandon(self) -> None:
        """Close a bracket that will not be finished: roll it back, if it is still open."""
        if self.current is not None:
            self._roll_back(self.current, ReloadError("the update was abandoned"))
        self.current = None

    def give_back(self) -> None:
        """Roll back an update whose undo log lies in what the engine has lent; use no more of it.

        What its trainer may still send of it is refused.
        """
        with self.turn.taken():
            if self.current is not None and not self.current.over and self.current.undo.cache_bytes:
                self._roll_back(self.current, ReloadError("the engine needs its KV cache"))
            self.reserve.lent = ()

    @property
    def quiet(self) -> float | None:
        """Seconds since anything came into the bracket that is open, or steps were held; None where
        none is, and none are."""
        heard = self.current.heard if self.current and self.in_bracket else None
        last = max((at for at in (heard, self._held) if at is not None), default=None)
        return None if last is None else time.monotonic() - last

    def take_back_what_was_left(self) -> None:
        """Roll back a bracket whose trainer is gone: into which nothing has come for too long.

        What its trainer may still send of it is refused, until it begins anew.
        """
        quiet = self.quiet
        if quiet is None or not 0 < self._timeout <= quiet or self.turn.elsewhere:
            return
        self._held = None
        if self.current is None or not self.in_bracket:
            logger.error("steps were held for an update that was not finished; they go on")
            return
        keeps = self.current.undo.can_restore
        logger.error(
            "an update was begun, and nothing has come of it for %.0f seconds "
            "(FLASHQUANT_BRACKET_TIMEOUT=%g): its trainer is taken to be gone. %s",
            quiet,
            self._timeout,
            "It is rolled back; requests go on under the weights from before it."
            if keeps
            else "It kept no undo log, so requests are refused until a complete update.",
        )
        self._roll_back(self.current, ReloadError("its trainer was gone"))

    def take_back_what_was_cut_off(self) -> None:
        """Roll back an update whose own call could not, as when it was interrupted twice.

        Raises:
            ReloadError: another thread is in that call.

        """
        if self.current is not None and self.current.busy:
            with self.turn.taken():
                logger.warning("an update was cut off in the middle of a call; it is rolled back")
                self._roll_back(self.current, ReloadError("it was cut off"))

    def check_servable(self) -> None:
        """Before a step: raise TornWeights rather than let a mixture of two policies generate."""
        self._stream.step()
        self.serving.check_servable()
        if self.turn.elsewhere:
            raise TornWeights(ELSEWHERE)
        self.take_back_what_was_cut_off()
        if self.current is not None and not self.current.over and self.current.undo.touched:
            raise TornWeights(
                "an update is under way, and some layers serve the new weights already. Finish it "
                "before the engine generates."
            )

    @contextmanager
    def _all_or_nothing(self, update: Update, *, commits: bool) -> Iterator[None]:
        """Leave with everything done, or with everything as it was."""
        update.busy = True
        try:
            with self._stream.joined():
                yield
                if commits:
                    with uninterrupted():
                        self._stand(update)
            update.busy, update.heard = False, time.monotonic()
        except BaseException as failure:
            self._roll_back(update, failure)
            raise
        finally:
            self.hold(self._held is not None)  # its time counts from the last that came

    def _roll_back(self, update: Update, failure: BaseException) -> None:
        """Roll an update back, unless it is committed, or the workers have agreed to commit it."""
        if update.over:
            return
        with uninterrupted(), self._stream.joined():
            if self._all_have_agreed(update, failure):
                self._stand(update)
                return
            self.serving.restoring = True  # until everything below has been done
            for stage, views in update.staged.items():
                for view in views:
                    stage.forget(view)
            update.undo.restore()
            if not update.undo.can_restore:
                self.serving.tear(update.at_stake)
            self.serving.moved |= isinstance(failure, MovedTensor)
            self.serving.restoring = False
            self._settle(update, False)
            update.busy, update.over = False, True
            if not update.bracket:
                self.current = None

    def _all_have_agreed(self, update: Update, failure: BaseException) -> bool:
        """Whether it is too late to go back; if not, no other worker will commit either."""
        if self._ballot is None or update.round is None:
            return False
        return not self._ballot.refuse(update.round, failure)

    def _stand(self, update: Update) -> None:
        """Nothing can take it back any more."""
        if update.prepares:
            self._spent.append(update.undo)  # the engine waits; what it holds is freed by `sweep`
        else:
            update.undo.forget()
        if update.committed or update.kv_scales:
            self.version += 1
        self.serving.heal(update.live)
        self._settle(update, True)
        update.busy, update.over = False, True
        self.current = None
