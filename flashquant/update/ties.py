"""A parameter that the engine holds once, and a trainer may name twice.

A head that is tied to the embeddings is one parameter here. A `state_dict` names it under both,
in whatever order, over whatever calls. What comes under its other names is stored nowhere: it
has to be what comes under its first one.

    embeddings, then head    compared at once, with what has arrived or is live
    head, then embeddings    its fingerprint waits for them
"""

from __future__ import annotations

from collections.abc import Collection, Mapping
from dataclasses import dataclass, field, replace

import torch
from torch import Tensor

from flashquant.errors import IncompleteUpdate, MisfitTensor
from flashquant.plan import Replay, TensorPlan, Write
from flashquant.schemes import fingerprint
from flashquant.update.engine import Layer
from flashquant.update.staging import write
from flashquant.update.undo import UndoLog


@dataclass(frozen=True)
class _Tie:
    """What has come of one parameter.

    Attributes:
        arrived: under its first name, and not under another one once more since.
        claims: fingerprints of what came under others before that.
        agreed: other names that what arrived has been compared with.

    """

    arrived: bool = False
    claims: Mapping[str, str] = field(default_factory=dict)
    agreed: frozenset[str] = frozenset()


class Ties:
    """All of one engine. What a failing push has changed here goes back with its undo log."""

    def __init__(self) -> None:
        self._ties: dict[str, _Tie] = {}
        self._homes: Mapping[str, Layer] = {}

    def open(self, targets: Collection[str], homes: Mapping[str, Layer]) -> None:
        """The engine serves.

        Args:
            targets: its parameters that have other names, by their first ones.
            homes: the layer of each parameter.

        """
        self._ties = {target: _Tie() for target in targets if target in homes}
        self._homes = homes

    def hold(self, targets: Collection[str]) -> bool:
        """Whether one of these parameters has other names."""
        return not self._ties.keys().isdisjoint(targets)

    def reset(self) -> None:
        """A beginning: what came before does not count."""
        self._ties = dict.fromkeys(self._ties, _Tie())

    def arrive(self, targets: Collection[str], undo: UndoLog) -> None:
        """These parameters arrive, under their first names.

        Raises:
            MisfitTensor: one is complete, and not what came under another name.

        """
        for target in self._ties.keys() & set(targets):
            layer, tie = self._homes[target], self._ties[target]
            if not layer.stage(target).complete:
                continue
            if tie.claims:
                now = fingerprint(layer.stage(target).memory(layer.device))
                for name, claimed in tie.claims.items():
                    self._check(claimed == now, name, target)
            self._set(target, _Tie(arrived=True, agreed=frozenset(tie.claims)), undo)

    def take(self, entry: TensorPlan, tensor: Tensor, undo: UndoLog) -> None:
        """A tensor came under another name.

        Args:
            entry: where it would go under the first one.
            tensor: as it was sent.
            undo: of the push that brought it.

        Raises:
            MisfitTensor: it is not what came under the first name.

        """
        for target in entry.targets:
            tie = self._ties[target]
            if tie.arrived and entry.name not in tie.agreed:
                self._check(self._same(entry, target, tensor), entry.name, target)
                tie = replace(tie, agreed=tie.agreed | {entry.name})
            else:  # the first of its kind, or again: of the next policy
                claim = fingerprint(self._as_stored(entry, target, tensor))
                tie = _Tie(claims={**tie.claims, entry.name: claim})
            self._set(target, tie, undo)

    def waiting(self) -> dict[str, tuple[str, ...]]:
        """The names that wait for the parameters they are tied to, by layer."""
        found: dict[str, tuple[str, ...]] = {}
        for target, tie in self._ties.items():
            held = _fingerprint(self._homes[target].held(target)) if tie.claims else ""
            if open_claims := tuple(n for n, claim in tie.claims.items() if claim != held):
                found[self._homes[target].name] = (*open_claims, target)
        return found

    def check_complete(self) -> None:
        """A bracket is to be closed.

        Raises:
            IncompleteUpdate: something came under another name only, and is not what is live.

        """
        for name, *others in self.waiting().values():
            raise IncompleteUpdate(
                f"{name} arrived, but {others[-1]}, to which it is tied in the engine, did not, "
                "and the engine holds other values of it. Send both, or leave the first one out; "
                "the old weights are still served."
            )

    def _set(self, target: str, tie: _Tie, undo: UndoLog) -> None:
        before = self._ties[target]

        def restore() -> None:
            self._ties[target] = before

        undo.remember_how(restore, live=False)
        self._ties[target] = tie

    def _check(self, same: bool, name: str, target: str) -> None:
        if same:
            return
        self._ties[target] = _Tie()  # refused once; what comes next is another try
        raise MisfitTensor(
            f"{name} and {target} arrived with different values, but this engine holds them once: "
            "they are tied, or were equal in the checkpoint that it started on. Push them equal "
            f"(or {target} alone), or start the engine on a checkpoint that holds both, with "
            "tie_word_embeddings=false in its config."
        )

    def _same(self, entry: TensorPlan, target: str, tensor: Tensor) -> bool:
        held = self._homes[target].held(target)
        if not isinstance(held, Tensor):
            return fingerprint(self._as_stored(entry, target, tensor)) == held
        return all(
            torch.equal(
                step.source_view.into(tensor).to(held.device, held.dtype),
                step.target_view.into(held),
            )
            for step in entry.steps
            if isinstance(step, Write) and step.target == target
        )

    def _as_stored(self, entry: TensorPlan, target: str, tensor: Tensor) -> Tensor:
        """The parameter as this tensor would fill it, in memory of its own."""
        layer = self._homes[target]
        stage = layer.stage(target).blank()
        for step in entry.steps:
            if step.target == target and not isinstance(step, Replay):
                write(step, tensor, stage, layer.device)
        return stage.memory(layer.device)


def _fingerprint(held: Tensor | str) -> str:
    return held if isinstance(held, str) else fingerprint(held)
