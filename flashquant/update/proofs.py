"""What shows that live weights are right: nothing moved, nothing else wrote, and a digest."""

from __future__ import annotations

import time
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import replace
from itertools import chain

import torch
from torch import Tensor

from flashquant.config.checks import Checks
from flashquant.errors import MovedTensor
from flashquant.schemes import Fingerprints, SeenMemory, digest, digests
from flashquant.update.engine import Engine, Layer
from flashquant.update.foreign_writes import ForeignWrites
from flashquant.update.integrity import Footprint, check_unmoved, footprints
from flashquant.update.report import ReloadReport
from flashquant.update.state import Update
from flashquant.update.transaction import Transactions


class Proofs:
    """The ledger, the digests, and the watch for foreign writes, of one live engine.

    Args:
        engine: the model.
        checks: which of them every update carries.
        transactions: the update under way, whose own writes are no foreign ones.

    """

    def __init__(self, engine: Engine, checks: Checks, transactions: Transactions) -> None:
        self.checks = checks
        self._engine, self._transactions = engine, transactions
        self._foreign_writes = ForeignWrites({})
        self._layers: dict[str, Layer] = {}
        self._unaudited: dict[str, Footprint] = {}

    def open(self) -> None:
        """Start to watch: the engine has its live layers."""
        self._layers = {layer.name: layer for layer in self._engine.layers}
        self._foreign_writes = ForeignWrites(
            {name: _parameters(layer.tensors()) for name, layer in self._layers.items()}
        )

    @property
    def foreign(self) -> tuple[str, ...]:
        """The parameters that another writer has modified since their layer was last updated."""
        return self._foreign_writes.foreign

    def look(self) -> None:
        """Report who wrote into live weights past this session, unless an update is under way."""
        if not self._transactions.under_way:
            self._foreign_writes.look()

    def look_at(self, layer: str) -> None:
        """The same of one layer, which is about to be written."""
        self._foreign_writes.look_at(layer)

    def footprints(self, layers: Sequence[Layer] | None = None) -> dict[str, Footprint]:
        """Where the live tensors of some layers are, or of all; empty if no ledger is kept."""
        if not self.checks.ledger:
            return {}
        found = self._engine.layers if layers is None else layers
        return footprints(item for layer in found for item in layer.tensors())

    def check_unmoved(
        self, before: Mapping[str, Footprint], layers: Sequence[Layer] | None = None
    ) -> None:
        """Raise MovedTensor where a live tensor of these layers, or of all, is elsewhere now."""
        check_unmoved(before, self.footprints(layers))

    def audit_later(self, before: dict[str, Footprint]) -> None:
        """A prepared update was committed: `audit` compares when the engine generates again."""
        self._unaudited = before

    def audit(self) -> None:
        """After a prepared update, when the engine generates again: nothing has moved.

        Raises:
            MovedTensor: a live tensor is not where it was. The engine is torn.

        """
        self._transactions.sweep()
        before, self._unaudited = self._unaudited, {}
        try:
            if before:
                self.check_unmoved(before)
        except MovedTensor:
            self._transactions.serving.moved = True
            raise

    def digest(self, seen: SeenMemory | None = None) -> str:
        """Fingerprint of everything the kernels read, equal for equal policies."""
        return digest(self.digests(seen))

    def digested(
        self,
        report: ReloadReport,
        start: float,
        *,
        always: bool = False,
        seen: SeenMemory | None = None,
    ) -> ReloadReport:
        """The report of an update that began at `start`, with the digest of what is live now.

        Args:
            always: even where no digests are asked for.
            seen: what the update has read of live memory since it last wrote any.

        """
        self.audit()
        if not (always or self.checks.digest):
            return replace(report, seconds=time.perf_counter() - start)
        digesting = time.perf_counter()
        whole = self.digest(seen)
        now = time.perf_counter()
        return replace(
            report,
            digest=whole,
            ranks=(whole,),
            phases={**report.phases, "digest": now - digesting},
            seconds=now - start,
        )

    def digests(self, seen: SeenMemory | None = None) -> dict[str, str]:
        """The same for each thing they read, by name."""
        contents = (item for layer in self._engine.layers for item in layer.contents())
        taken = digests(chain(contents, self._engine.cache_scales.contents()), seen)
        if not self._transactions.under_way:
            self._foreign_writes.compare(taken)
        return taken

    def digesting(self) -> Iterator[str | None]:
        """The digest, in slices of a layer: None until it is known, or if an update came between.

        For an engine that generates meanwhile.
        """
        version, fingerprints = self._transactions.version, Fingerprints()
        for layer in self._engine.layers:
            fingerprints.add(layer.contents())
            yield None
        fingerprints.add(self._engine.cache_scales.contents())
        if self._transactions.version == version and not self._transactions.under_way:
            taken = fingerprints.read()
            self._foreign_writes.compare(taken)
            yield digest(taken)

    def forget(self) -> None:
        """The bytes are no longer what they were, and that is known."""
        self._foreign_writes.forget()

    def settle(self, update: Update, wanted: Iterable[str], *, committed: bool) -> None:
        """An update is over: what it wrote is no foreign write.

        Args:
            update: it.
            wanted: parameters that a complete update fills.
            committed: whether its weights are live now; else they were put back.

        """
        if committed:
            unsent = self._unsent(update, set(wanted))
            self._foreign_writes.settle(update.committed, unsent, update.live)
            return
        self._foreign_writes.rebase(None if update.bracket else update.touched)
        if not update.undo.can_restore:
            self._foreign_writes.forget()

    def _unsent(self, update: Update, wanted: set[str]) -> dict[str, set[str]]:
        """Of layers that went live without some of their parameters: which those are."""
        found = {}
        for name in update.committed:
            targets = wanted.intersection(self._layers[name].targets)
            if not targets <= update.live:
                found[name] = targets - update.live
        return found


def _parameters(live: Iterable[tuple[str, Tensor]]) -> list[tuple[str, Tensor]]:
    """What could be taken for a weight; caches and workspaces change as they please."""
    return [(name, tensor) for name, tensor in live if isinstance(tensor, torch.nn.Parameter)]
