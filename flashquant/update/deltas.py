"""A bundle of what changed goes into the live engine: onto the policy it starts from, or not.

    on which policy?   of the engine's digest, where the last bundle left it; else of what can be
                       read back of the live tensors
    each layer         what changed is overwritten where kernels read it as it was sent; else
                       its old tensors, read back or kept; the new ones made of them; pushed
    at the end         the digest of the new policy has to be the bundle's, or all is taken back

What no live memory shows (packed for a kernel, made by vLLM itself, a shard of a whole) is kept on
the host from the first whole bundle on, as it was sent.
"""

from __future__ import annotations

import functools
import os
import time
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field

import torch
from torch import Tensor

from flashquant.errors import BrokenDelta, MisfitTensor, ReloadError, StaleBase
from flashquant.schemes import Fingerprints, SeenMemory, check_finite, holds_codes
from flashquant.sender import Change, Delta, Manifest, TensorSpec, policy_digest
from flashquant.update.code_statistics import noted_in_place
from flashquant.update.engine import Layer
from flashquant.update.in_place import Window
from flashquant.update.report import ReloadReport
from flashquant.update.session import Session
from flashquant.update.state import Update

Source = Delta | str | os.PathLike[str]


@dataclass
class _Policy:
    """What is known of the policy that is live.

    Attributes:
        version: of the engine with it; None where it was read just now.
        engine: the engine's digest with it; None where none was taken.
        fingerprints: of every tensor, as it was sent.
        kept: the tensors that cannot be read back. Written only with the way back in an undo log.
        seen: live memory as it was read last, if nothing has been written since.

    """

    version: int | None = None
    engine: str | None = None
    fingerprints: dict[str, str] = field(default_factory=dict)
    kept: dict[str, Tensor] = field(default_factory=dict)
    seen: SeenMemory = field(default_factory=dict)

    @property
    def digest(self) -> str:
        return policy_digest(self.fingerprints)


class Deltas:
    """Applies bundles to the model of one session.

    Args:
        session: of the model.

    """

    def __init__(self, session: Session) -> None:
        self._session, self._checkpoint = session, session.checkpoint
        self._policy = _Policy()

    @property
    def kept_bytes(self) -> int:
        """Host memory that holds what cannot be read back, in bytes."""
        return sum(tensor.nbytes for tensor in self._policy.kept.values())

    def manifest(self) -> Manifest:
        """What the engine wants to be sent; its digest also where only bundles tell it.

        Raises:
            ReloadError: the engine started without a checkpoint, so its names are not known.

        """
        session = self._session
        elsewhere = session.transactions.turn.elsewhere
        if not elsewhere:
            session.transactions.take_back_what_was_cut_off()
        idle = not (elsewhere or session.transactions.under_way)
        settled = idle and not (
            session.transactions.serving.asleep or session.transactions.serving.torn
        )
        found = self._checkpoint.manifest(session.version, settled=settled)
        if settled and found.digest is None and self._is_known:
            return found.model_copy(update={"digest": self._policy.digest})
        return found

    def apply(self, source: Source) -> ReloadReport:
        """One update by a bundle, or by the file that holds it.

        Raises:
            StaleBase: it starts from another policy, or nobody can tell which one is live.
            BrokenDelta: it is cut, contradicts itself, or is for another engine.
            ReloadError: as `Session.reload`. Whichever it is, the live weights are what they were.

        """
        with self._session.transactions.turn.taken():
            return self._apply(source)

    def _apply(self, source: Source) -> ReloadReport:
        start = time.perf_counter()
        self._session.begin(ledger=False)
        try:
            self.take(source)
            report = self._session.close()
        except BrokenDelta:
            self._session.abandon()
            self._check_untouched()
            raise
        finally:
            self._session.abandon()
        policy, proofs = self._policy, self._session.proofs
        seen, policy.seen = policy.seen, {}
        report = proofs.digested(report, start, always=bool(policy.kept), seen=seen)
        policy.engine, policy.version = report.digest, self._session.version
        return report

    def take(self, source: Source) -> None:
        """A bundle is all of the bracket that is open; whoever began it finishes it.

        Raises:
            ReloadError: there is no bracket, or something has come in it already; or as `apply`.

        """
        transactions = self._session.transactions
        if not transactions.in_bracket or self._update.names or self._update.committed:
            raise ReloadError(
                "a bundle of changes is an update by itself: begin one, send the bundle alone, and "
                "finish it"
            )
        fresh = _Policy(version=self._session.version + 1)
        with torch.inference_mode(mode=False):  # what is kept is written by later bundles
            self._session.push(self._tensors(source, fresh))
        before = functools.partial(setattr, self, "_policy", self._policy)
        self._update.undo.remember_how(before, live=False)
        self._policy = fresh

    @property
    def _is_known(self) -> bool:
        """Whether the engine is where the last bundle left it.

        What can be read back is compared after each bundle anyway; of what cannot, only the
        engine's digest tells.
        """
        known, session = self._policy, self._session
        disturbed = session.transactions.serving.torn or bool(session.proofs.foreign)
        is_last = known.version == session.version and not disturbed
        if is_last and not (known.kept and known.engine):
            return True
        return known.engine is not None and session.proofs.digest() == known.engine

    def _check_untouched(self) -> None:
        """After a bundle gave another policy than it says: whether its base was live at all.

        Raises:
            StaleBase: what can be read back is not what the last bundle left.

        """
        known = self._policy
        if known.version is None:
            return
        found = self._checkpoint.fingerprints(self._checkpoint.specs())
        other = [name for name, value in found.items() if known.fingerprints[name] != value]
        if other:
            self._policy = _Policy()
            raise StaleBase(
                f"{len(other)} live tensors, first {other[0]}, are no longer what the last bundle "
                "made of them: another writer has modified them. Apply one whole bundle "
                "(`Sender.snapshot()`)."
            )

    def _tensors(self, source: Source, fresh: _Policy) -> Iterator[tuple[str, Tensor]]:
        """Every tensor of the layers that change; raises before the first one what can be told."""
        delta = source if isinstance(source, Delta) else Delta.load(source)
        specs = self._checkpoint.specs()
        said = delta.header.tensors
        elsewhere = self._checkpoint.elsewhere(said.keys() - specs.keys())
        delta.check_fits(self._checkpoint.scheme, specs, elsewhere)
        old = _Policy() if delta.is_whole else self._base(delta, specs)
        fresh.fingerprints |= old.fingerprints
        fresh.fingerprints |= {name: said[name].fingerprint for name in elsewhere}
        fresh.kept |= old.kept
        groups = self._checkpoint.groups(specs)
        windows = {name: self._checkpoint.window(name, spec) for name, spec in specs.items()}
        changed = [group for group in groups if not said.keys().isdisjoint(group)]
        pushed = [group for group in changed if not all(windows[n] for n in group if n in said)]
        staged = {name for group in pushed for name in group}
        in_place = {n: w for n, w in windows.items() if w is not None and n not in staged}
        written = {n: w for n, w in in_place.items() if n in said}
        self._expect(self._checkpoint.layers({name: specs[name] for name in staged}), written)
        self._overwrite(written, delta)
        new, seen = Fingerprints(), SeenMemory()
        new.add(((n, w.live.view(specs[n].shape)) for n, w in in_place.items()), seen)
        for group in pushed:
            # All of a layer is read before any of it is written.
            tensors = {name: self._new(name, specs[name], delta, fresh) for name in group}
            new.add((n, t) for n, t in tensors.items() if n in said or n not in fresh.kept)
            yield from tensors.items()
            del tensors
        rest = (name for name in specs if name not in in_place and name not in staged)
        new.add(self._checkpoint.readable({name: specs[name] for name in rest}))
        fresh.fingerprints |= new.read()
        fresh.seen = {} if pushed else seen  # what is pushed is written from now on
        if fresh.digest != delta.header.digest:
            raise BrokenDelta(
                f"a bundle gives the policy {fresh.digest}, and says that it gives "
                f"{delta.header.digest}: some of its bytes are not those that were sent. Have it "
                "sent again, or take a whole bundle (`Sender.snapshot()`)."
            )

    @property
    def _update(self) -> Update:
        """The update under way."""
        update = self._session.transactions.current
        if update is None or update.over:
            raise ReloadError("the update was rolled back before it was written; send it anew")
        return update

    def _expect(self, staged: Mapping[str, Layer], written: Mapping[str, Window]) -> None:
        """Before anything is touched: the update is complete with these, and nothing may move.

        Args:
            staged: what is pushed: parameter -> layer.
            written: windows that are overwritten. Nothing moves where that is all there is to it.

        """
        update = self._update
        update.wanted = frozenset(staged)
        made_anew = [w.layer for w in written.values() if w.target not in w.layer.homes]
        if update.audited is not None:  # else all of it was noted when it began
            update.audited = tuple(dict.fromkeys((*staged.values(), *made_anew)))
            update.before = self._session.proofs.footprints(update.audited)

    def _overwrite(self, windows: Mapping[str, Window], delta: Delta) -> None:
        """Write what changed where it is live, for no step runs in a bracket; then make anew what
        is made of it."""
        update, start = self._update, time.perf_counter()
        undo, statistics = update.undo, update.statistics
        changed: dict[str, tuple[Layer, list[str]]] = {}
        said = delta.header.tensors
        _check_finite({name: delta.change(name) for name in windows if said[name].form != "whole"})
        for name, window in windows.items():
            found = delta.change(name)
            if found.form == "whole":
                check_finite(name, found.values)
                undo.remember(window.live)
                window.live.copy_(found.values.view(window.live.shape))
            else:
                delta.write(name, window.live, lambda back, n: undo.remember_how(back, nbytes=n))
            statistics.read(found.values.nbytes)
            statistics.bytes_out += found.values.nbytes
            if holds_codes(found.values.dtype):
                statistics.noted[name] = noted_in_place(window.live)
            changed.setdefault(window.layer.name, (window.layer, []))[1].append(window.target)
        start = statistics.since(start, "write")
        for layer, targets in changed.values():
            statistics.bytes_out += layer.refresh(dict.fromkeys(targets), undo)
            update.committed.add(layer.name)
            update.live.update(layer.targets)
        statistics.since(start, "commit")

    def _base(self, delta: Delta, specs: Mapping[str, TensorSpec]) -> _Policy:
        """The live policy, if it is the one that a delta starts from.

        Raises:
            StaleBase: it is not.

        """
        if not self._is_known:  # whoever wrote since, what was kept is of no use any more
            self._policy = _Policy(fingerprints=self._checkpoint.fingerprints(specs))
        found = self._policy
        if unseen := [name for name in specs if name not in found.fingerprints]:
            raise StaleBase(
                f"a delta starts from policy {delta.header.base}, and the engine cannot tell which "
                f"one it serves: {len(unseen)} of its tensors, first {unseen[0]}, are not to be "
                "read back (packed for a kernel, or held in part), and were not sent by the last "
                "bundle. Apply one whole bundle first (`Sender.snapshot()`): it keeps them."
            )
        if found.digest != delta.header.base:
            raise StaleBase(
                f"a delta starts from policy {delta.header.base}, and the engine serves "
                f"{found.digest}. Apply the deltas in between, or one whole bundle "
                "(`Sender.snapshot()`)."
            )
        return found

    def _new(self, name: str, spec: TensorSpec, delta: Delta, fresh: _Policy) -> Tensor:
        """What a tensor is to be; kept, where it cannot be read back."""
        shown, said = self._checkpoint.shows(name, spec), delta.header.tensors.get(name)
        if shown and said is not None and said.form == "whole":
            return delta.parts[name]
        if shown:
            value = self._checkpoint.read(name, spec)
            return value if said is None else delta.rebuilt(name, value)
        if said is None:
            return fresh.kept[name]
        if said.form == "whole":
            fresh.kept[name] = delta.owned(name)
            return fresh.kept[name]
        undo = self._update.undo
        delta.write(
            name,
            fresh.kept[name],
            lambda back, size: undo.remember_how(back, live=False, nbytes=size),
        )
        return fresh.kept[name]


def _check_finite(changes: Mapping[str, Change]) -> None:
    """As `schemes.check_finite`; the few codes of many tensors are looked at together.

    Raises:
        MisfitTensor: a value is NaN or infinite.

    """
    few: dict[torch.dtype, dict[str, Tensor]] = {}
    for name, found in changes.items():
        if found.form != "whole" and holds_codes(found.values.dtype):
            few.setdefault(found.values.dtype, {})[name] = found.values
        else:
            check_finite(name, found.values)
    for values in few.values():
        try:
            check_finite("", torch.cat(list(values.values())))
        except MisfitTensor:
            for name, value in values.items():
                check_finite(name, value)
