"""One session a model: the only room that knows the order.

    for each tensor:  plan it (once) -> quantize it -> write it -> commit its layer
    at the end:       all arrived, none moved, all workers agree; or everything as it was before

A push outside a bracket is a transaction of its own; a layer goes live when the last of its shards
has arrived, in whichever push of one sync (`passes` tells syncs apart). Inside a bracket (`begin`
to `finish`) nothing is committed until the end.
"""

from __future__ import annotations

import time
from collections.abc import Mapping

import torch

from flashquant.config.checks import Checks
from flashquant.errors import FlashquantError, ReloadError, UnsupportedEngine
from flashquant.plan import (
    NamedTensors,
    Names,
    Offered,
    Planner,
    Weights,
    WritePlan,
    named_tensors,
    naming_the_file,
)
from flashquant.profiles import Calibration
from flashquant.update.agreement import Ballot
from flashquant.update.bindings import Bindings
from flashquant.update.checkpoint import Checkpoint
from flashquant.update.code_statistics import CodeStatistics
from flashquant.update.completeness import Completeness
from flashquant.update.engine import Engine, KVScales
from flashquant.update.first_load import FirstLoad
from flashquant.update.pipeline import Pipeline
from flashquant.update.proofs import Proofs
from flashquant.update.report import ReloadReport
from flashquant.update.reporter import Reporter
from flashquant.update.state import Update
from flashquant.update.status import Status
from flashquant.update.ties import Ties
from flashquant.update.transaction import Transactions
from flashquant.update.undo import UndoLog


class Session:
    """Brings pushed weights into one serving model, in place, all or nothing.

    Args:
        engine: the model, as `flashquant.update.engine` describes it.
        checks: which proofs every reload carries.
        ballot: the voice of this worker among several; None where it is the only one.
        calibration: the profile by which pushes are quantized; None where each row is by itself.

    """

    def __init__(
        self,
        engine: Engine,
        *,
        checks: Checks | None = None,
        ballot: Ballot | None = None,
        calibration: Calibration | None = None,
    ) -> None:
        self.rank = 0 if ballot is None else ballot.rank
        self._calibration = calibration
        self._engine = engine
        checks = checks or Checks()
        self.transactions = Transactions(ballot, self._settle, checks, engine.device)
        self.proofs = Proofs(engine, checks, self.transactions)
        self._planner = Planner(engine)
        self._bindings = Bindings(engine, self._planner, calibration)
        self.checkpoint = Checkpoint(engine, self._planner, self._bindings)
        self._completeness = Completeness(engine, self._planner, calibration)
        self._code_statistics = CodeStatistics(
            1.0 if calibration is None else calibration.warn_above
        )
        self._ties = Ties()
        self._pipeline = Pipeline(
            engine, self._bindings, self._ties, self._code_statistics, calibration, self.proofs
        )
        self._first_load = FirstLoad(engine, self._planner, self._code_statistics, calibration)
        self._names = Names(self._planner)
        self._reporter = Reporter(
            engine, self._planner, self._completeness, self._ties, self.transactions
        )

    @property
    def plan(self) -> WritePlan:
        """Where every name seen so far lands."""
        return self._planner.plan

    @property
    def landed(self) -> Mapping[str, tuple[str, ...]]:
        """The parameters in which each tensor of the checkpoint has landed, by its name."""
        return self._planner.landed

    def lands(self, forms: NamedTensors) -> Mapping[str, tuple[str, ...]]:
        """The same of a checkpoint that the engine has not started on.

        Args:
            forms: its tensors, on meta.

        """
        named = dict(forms)
        self._planner.learn_together(named.items())
        return {name: self.plan[name].targets for name in named if name in self.plan}

    @property
    def live(self) -> bool:
        """Whether the model has been loaded and processed, so that pushes are reloads."""
        return bool(self._bindings.homes)

    @property
    def version(self) -> int:
        """How many updates are committed; 0 is the checkpoint the engine started on."""
        return self.transactions.version

    def first_load(self, weights: NamedTensors) -> object:
        """Load the checkpoint the engine starts on: the same stream, the engine's own writes.

        Raises:
            UnsupportedEngine: its loader knows a weight, and not the scales that are made of it.

        """
        try:
            return self._engine.load(self._first_load.stream(weights))
        except (KeyError, ValueError) as refusal:
            explained = isinstance(refusal, FlashquantError)
            if explained or (scales := self._planner.refused_of_made()) is None:
                raise
            raise UnsupportedEngine(
                f"{scales.removesuffix('_scale')} becomes codes and scales in "
                f"{self._engine.scheme}, and vLLM's loader of this model has no place for "
                f"{scales} ({refusal}). Serve it in fp8_channel, fp8_vllm or bf16."
            ) from refusal

    def open(self) -> None:
        """The first load is done and processed: from now on, every push is a reload.

        Raises:
            ProfileError: the calibration does not fit what has been loaded.

        """
        if self._calibration is not None:
            self._calibration.check_fit()
        self._planner.open()
        self._bindings.open()
        self._ties.open(set(self._engine.tied.values()), self._bindings.homes)
        self.proofs.open()

    def push(self, weights: NamedTensors) -> set[str]:
        """Take one tensor, one bucket or a whole iterator; layers go live as they complete.

        Nothing keeps a reference to an incoming tensor after the call.

        Returns:
            The engine's names of the parameters that were written or staged, as
            its own `load_weights` returns them.

        Raises:
            ReloadError: and the live weights are what they were before the call
                (before `begin`, inside a bracket).

        """
        with self.transactions.turn.taken():
            return self._push(weights)

    def _push(self, weights: NamedTensors) -> set[str]:
        self.transactions.take_back_what_was_cut_off()
        offered, alone = Offered(self._names.of(weights)), self.transactions.current is None
        with (
            self._reporter.refusing(offered.names),
            self.transactions.push() as update,
            torch.no_grad(),
        ):
            if not alone:
                return self._pipeline.take(offered, update)
            update.offered = offered.names
            written = self._pipeline.take(self._completeness.watched(offered, update), update)
            self._pipeline.finish(update)
            self._make_anew(update)
            return written

    def begin(
        self,
        *,
        atomic: bool = True,
        prepares: bool = False,
        kv_scales: KVScales | None = None,
        ledger: bool = True,
    ) -> Update:
        """Open a bracket: nothing is committed until `finish`. What waits is dropped, and said so.

        A bracket that is still open, because whoever began it went away, is rolled back.

        Args:
            atomic: keep what it takes to put the old weights back.
            prepares: make everything beside the live layers, which costs the memory of a second
                set of weights (two, if `atomic`), so that the engine may generate until `finish`.
            kv_scales: of the KV cache, from `finish` on.
            ledger: note where everything is now; else whoever fills the update notes what it needs.

        Returns:
            The update that is under way now.

        Raises:
            ReloadError: these scales could not be set.

        """

        def first() -> None:
            if kv_scales:
                self._engine.cache_scales.check(kv_scales)
            self.proofs.look()
            self.proofs.audit()

        undo = UndoLog(keep=atomic, borrows=not prepares, reserve=self.transactions.reserve)
        update = Update(undo, bracket=True, prepares=prepares, kv_scales=dict(kv_scales or {}))
        with (
            self.transactions.turn.taken(),
            self._reporter.refusing(),
            self.transactions.begin(update, first),
        ):
            if not atomic:
                update.at_stake = frozenset(self._planner.wanted)
            self._completeness.drop()
            self._ties.reset()
            if ledger:
                update.before = self.proofs.footprints()
            else:
                update.audited = ()
        return update

    def finish(self, *, strict: bool = False, keeps: bool = False) -> None:
        """Close the bracket.

        Args:
            strict: every parameter of the checkpoint must have arrived. Without
                it, whole layers may stay as they were, half a layer may not, unless
            keeps: what is missing of a layer stays as it is, where its rows can be kept.

        Raises:
            IncompleteUpdate: not everything arrived.
                Everything is as it was before `begin`.
            PeerFailed: another worker refused; likewise.
            MovedTensor: a live tensor is not where it was. The engine is torn.

        """
        with (
            self.transactions.turn.taken(),
            self._reporter.refusing(),
            self.transactions.finish() as update,
            torch.no_grad(),
        ):
            if keeps:
                self._pipeline.keep_rest(update, self.transactions.serving.stale)
            self._pipeline.finish(update)
            self._ties.check_complete()
            wanted = self._planner.wanted if update.wanted is None else update.wanted
            self._completeness.check_complete(update, wanted, strict=strict, keeps=keeps)
            self._pipeline.swap_in(update)
            self._make_anew(update)
            self._engine.cache_scales.set(update.kv_scales, update.undo)
            if update.prepares:
                self.proofs.audit_later(update.before)
            else:
                self.proofs.check_unmoved(update.before, update.audited)
        self._ties.reset()

    def _make_anew(self, update: Update) -> None:
        if update.committed:
            self._engine.make_anew(update.undo)

    def check_nothing_waits(self) -> None:
        """The trainer has sent everything it wanted to, in pushes outside a bracket.

        Without effect inside one, which is checked when it is finished.

        Raises:
            IncompleteUpdate: some layers have arrived in part, or were refused and never
                came again; they serve their old weights beside the new ones of others.

        """
        if not self.transactions.in_bracket:
            with self.transactions.turn.taken(), self._reporter.refusing():
                self._ties.check_complete()
                self._completeness.check_nothing_waits(self._planner.wanted)

    def abandon(self) -> None:
        """Close a bracket that will not be finished: roll it back, if it is still open.

        Raises:
            ReloadError: another thread is in the middle of it.

        """
        with self.transactions.turn.taken():
            self.transactions.abandon()

    def reload(
        self,
        weights: Weights,
        *,
        atomic: bool = True,
        strict: bool = True,
        prepare: bool = False,
        kv_scales: KVScales | None = None,
    ) -> ReloadReport:
        """One whole update: `begin`, push everything, `finish`, and a report of it.

        Raises:
            ReloadError: as these; or another thread is in the middle of a call.

        """
        start = time.perf_counter()
        with self.transactions.turn.taken():
            self.begin(atomic=atomic, prepares=prepare, kv_scales=kv_scales)
            try:
                tensors = named_tensors(weights, reuses=True)
                try:
                    self.push(tensors)
                except ReloadError as failure:
                    raise naming_the_file(failure, tensors) from failure.__cause__
                report = self.close(strict=strict)
            finally:
                self.abandon()
            return self.proofs.digested(report, start)

    def close(self, *, strict: bool = True) -> ReloadReport:
        """`finish` what was begun, and tell what it did; without a digest."""
        update, start = self.transactions.current, time.perf_counter()
        self.finish(strict=strict, keeps=not strict)
        if update is None:
            raise ReloadError("no update is under way")
        now = time.perf_counter()
        paused = start if update.prepares else update.start
        return self._reporter.report(update, now, pause=now - paused)

    def check_servable(self) -> None:
        """Raise TornWeights rather than let a mixture of two policies generate."""
        self.transactions.check_servable()
        self.proofs.look()

    def sleep(self, *, keeps_weights: bool) -> None:
        """The engine is about to put its weights away, for good unless `keeps_weights`."""
        self.abandon()
        self._completeness.drop()
        self._ties.reset()
        self.transactions.sweep()
        self.transactions.free()
        self.transactions.serving.asleep = True
        if not keeps_weights:
            self._code_statistics.forget()
            self.proofs.forget()
            if self._calibration is not None:
                self._calibration.forget_device()
            self.transactions.serving.tear(self._planner.wanted)

    def overwritten(self) -> None:
        """Everything was overwritten: the engine is torn until a complete update was pushed."""
        self.abandon()
        self._completeness.drop()
        self._ties.reset()
        self.proofs.forget()
        self.transactions.serving.tear(self._planner.wanted)

    def wake_up(self) -> None:
        """There is memory behind the weights again."""
        self.transactions.serving.asleep = False

    def restore_cache_scales(self) -> None:
        """The engine wakes up, and may have lost the scales of its KV cache."""
        if not self.transactions.serving.asleep:
            self._engine.cache_scales.restore()

    def status(self) -> Status:
        """How the model stands: version, pending shards, kinds of layers and fresh digests."""
        parameters = {} if self.transactions.serving.asleep else self.proofs.digests()
        self.proofs.look()
        return self._reporter.status(parameters, self.proofs.foreign)

    def _settle(self, update: Update, committed: bool) -> None:
        """An update is over: what is live is what it should be."""
        for layer in () if committed else update.prepared.values():
            layer.drop()
        if committed:
            statistics = update.statistics
            statistics.drift = self._code_statistics.settle(statistics.noted)
            self._completeness.settle(update)
            if not update.bracket:
                self._reporter.note_ignored(statistics.ignored)
        wanted = self._planner.wanted if committed else ()
        self.proofs.settle(update, wanted, committed=committed)
