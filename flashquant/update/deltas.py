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

import os
import time
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, field

from torch import Tensor

from flashquant.errors import BrokenDelta, ReloadError, StaleBase
from flashquant.schemes import Fingerprints, check_finite, holds_codes
from flashquant.sender import Delta, Manifest, TensorSpec, policy_digest
from flashquant.update.code_statistics import noted_in_place
from flashquant.update.in_place import Window
from flashquant.update.report import ReloadReport
from flashquant.update.session import Session

Source = Delta | str | os.PathLike[str]


@dataclass
class _Policy:
    """What is known of the policy that is live.

    Attributes:
        engine: the engine's digest with it; while that holds, so does the rest.
        fingerprints: of every tensor, as it was sent.
        kept: the tensors that cannot be read back. Never written into.

    """

    engine: str | None = None
    fingerprints: dict[str, str] = field(default_factory=dict)
    kept: dict[str, Tensor] = field(default_factory=dict)

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
        session.transactions.take_back_what_was_cut_off()
        idle = not session.transactions.under_way
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
        start, fresh = time.perf_counter(), _Policy()
        self._session.begin()
        try:
            self._session.push(self._tensors(source, fresh))
            report = self._session.close()
        finally:
            self._session.abandon()
        report = self._session.proofs.digested(report, start, always=True)
        fresh.engine = report.digest
        self._policy = fresh
        return report

    @property
    def _is_known(self) -> bool:
        """Whether the engine is where the last bundle left it."""
        return self._policy.engine is not None and (
            self._session.proofs.digest() == self._policy.engine
        )

    def _tensors(self, source: Source, fresh: _Policy) -> Iterator[tuple[str, Tensor]]:
        """Every tensor of the layers that change; raises before the first one what can be told."""
        delta = source if isinstance(source, Delta) else Delta.load(source)
        specs = self._checkpoint.specs()
        delta.check_fits(self._checkpoint.scheme, specs)
        old = _Policy() if delta.is_whole else self._base(delta, specs)
        fresh.fingerprints |= old.fingerprints
        fresh.kept |= old.kept
        groups, said = self._checkpoint.groups(specs), delta.header.tensors
        changed = [group for group in groups if not said.keys().isdisjoint(group)]
        windows = {name: self._checkpoint.window(name, specs[name]) for name in said}
        in_place = [g for g in changed if all(windows.get(name, True) for name in g)]
        pushed = [group for group in changed if group not in in_place]
        self._expect((name, specs[name]) for group in pushed for name in group)
        new = Fingerprints()
        for name in (name for group in in_place for name in group):
            if (window := windows.get(name)) is not None:
                self._overwrite(name, window, delta)
                new.add([(name, window.live.view(specs[name].shape))])
        for group in pushed:
            # All of a layer is read before any of it is written.
            tensors = {name: self._new(name, specs[name], delta, old, fresh) for name in group}
            new.add((name, tensors[name]) for name in group if name in delta.header.tensors)
            yield from tensors.items()
            del tensors
        fresh.fingerprints |= new.read()
        if fresh.digest != delta.header.digest:
            raise BrokenDelta(
                f"a bundle gives the policy {fresh.digest}, and says that it gives "
                f"{delta.header.digest}: some of its bytes are not those that were sent. Have it "
                "sent again, or take a whole bundle (`Sender.snapshot()`)."
            )

    def _overwrite(self, name: str, window: Window, delta: Delta) -> None:
        """Write what changed of a tensor where the kernels read it: no step runs in a bracket."""
        update = self._session.transactions.current
        if update is None or update.over:
            raise ReloadError(f"the update was rolled back before {name} was written; send it anew")
        values = delta.change(name).values
        check_finite(name, values)
        undo = update.undo
        delta.write(name, window.live, lambda back, size: undo.remember_how(back, nbytes=size))
        update.statistics.read(values.nbytes)
        update.statistics.bytes_out += values.nbytes
        update.committed.add(window.layer.name)
        update.live.update(window.layer.targets)
        if holds_codes(values.dtype):
            update.statistics.noted[name] = noted_in_place(window.live)

    def _expect(self, tensors: Iterable[tuple[str, TensorSpec]]) -> None:
        """The update under way is complete with these tensors, and not without them."""
        plans = (self._checkpoint.plan_of(name, spec) for name, spec in tensors)
        if (update := self._session.transactions.current) is not None:
            update.wanted = frozenset(target for plan in plans for target in plan.targets)

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

    def _new(
        self, name: str, spec: TensorSpec, delta: Delta, old: _Policy, fresh: _Policy
    ) -> Tensor:
        """What a tensor is to be; kept, where it cannot be read back."""
        shown = self._checkpoint.shows(name, spec)
        if name not in delta.header.tensors:
            return self._checkpoint.read(name, spec) if shown else old.kept[name]
        if delta.header.tensors[name].form == "whole":
            value = delta.parts[name]
        elif shown:
            value = delta.rebuilt(name, self._checkpoint.read(name, spec))
        else:
            value = delta.rebuilt(name, old.kept[name].clone())
        if not shown:
            fresh.kept[name] = value
        return value
