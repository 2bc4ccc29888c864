"""Has everything arrived? What layers wait for, what was dropped, what was refused."""

from __future__ import annotations

import logging
from collections import Counter
from collections.abc import Collection, Iterable, Iterator, Mapping, Sequence
from collections.abc import Set as AbstractSet
from itertools import chain

from torch import Tensor

from flashquant.errors import IncompleteUpdate
from flashquant.plan import NamedTensors, Planner
from flashquant.profiles import Calibration
from flashquant.update.engine import Engine, Layer
from flashquant.update.passes import Passes
from flashquant.update.state import Update
from flashquant.update.wording import some_of

logger = logging.getLogger(__name__)

Waiting = Mapping[str, tuple[str, ...]]


class Completeness:
    """What one engine still has to be sent, as far as can be told.

    Args:
        engine: the model.
        planner: where the tensors of its checkpoint land.
        calibration: the profile by which pushes are quantized, which looks at several at once.

    Attributes:
        refused: tensors of pushes that failed, which have not come again.
        dropped: layer -> what it lacked when the sync that it had half arrived from was over;
            until it goes live again.

    """

    def __init__(
        self, engine: Engine, planner: Planner, calibration: Calibration | None = None
    ) -> None:
        self.refused: set[str] = set()
        self.dropped: dict[str, tuple[str, ...]] = {}
        self._engine, self._planner, self._calibration = engine, planner, calibration
        self._passes = Passes()
        self._arrived: set[str] = set()  # parameters, since the trainer last said that it was done
        self._times_dropped: Counter[str] = Counter()  # layers, since each last went live
        self._unsaid: set[str] = set()  # of those dropped: no end of a sync has said so yet
        self._rest: frozenset[str] | None = None  # tensors that were missing when a sync was over

    def waiting(self, layers: Iterable[Layer] | None = None) -> dict[str, tuple[str, ...]]:
        """Of these layers, or of all, those that have arrived in part, and what each waits for."""
        some = self._engine.layers if layers is None else layers
        return {layer.name: missing for layer in some if (missing := layer.missing)}

    def watched(self, weights: NamedTensors, update: Update) -> Iterator[tuple[str, Tensor]]:
        """The tensors of a push outside a bracket; where they begin a new sync, nothing that was
        left of the last one is there any more."""
        self._passes.start()
        rest = self._rest
        for name, tensor in weights:
            begins = self._passes.begins_with(name)
            if rest is not None and name not in rest:  # not what is missing: all is sent anew
                begins, rest = True, None
            if begins:
                self._drop_earlier(update)
            yield name, tensor

    def drop(self) -> None:
        """A bracket begins, or the weights are put away: forget what has arrived in part."""
        self._note_dropped(self.waiting())
        self._rest = None
        for layer in self._engine.layers:
            layer.drop()
        if self._calibration is not None:
            self._calibration.begin_anew()
        self._passes.close()

    def note_refused(self, names: AbstractSet[str]) -> None:
        """A push outside a bracket failed, and its tensors with it."""
        self.refused |= names
        self._passes.note_refused(names)

    def settle(self, update: Update) -> None:
        """An update is committed."""
        for layer in update.committed:
            self.dropped.pop(layer, None)
            self._times_dropped.pop(layer, None)
        self._unsaid &= self.dropped.keys()
        if update.bracket:
            self._unsaid.clear()  # it has said by itself what it brought
            self.refused -= update.names
            return
        self._note_dropped(update.dropped)
        if self._rest is not None:
            is_rest = update.offered <= self._rest
            self._rest = (self._rest - update.offered or None) if is_rest else None
        self.refused -= update.offered
        self._arrived |= update.arrived
        self._passes.note_taken(update.offered)

    def check_complete(
        self, update: Update, wanted: Iterable[str], *, strict: bool, keeps: bool
    ) -> None:
        """Refuse to close a bracket on half of a layer, or on half of the parameters.

        Args:
            wanted: every parameter of the engine's checkpoint.
            strict: all of them must have arrived.
            keeps: what is missing of a layer is taken from what is live, where that can be done.

        Raises:
            IncompleteUpdate: they have not; the bracket is rolled back.

        """
        waiting = self.waiting(update.waiting.values())
        if waiting:
            remedy = (
                "What is live of them cannot be kept: it is packed, or shares a scale with what "
                "was sent, or codes and scales did not come for the same rows. "
                if keeps
                else ""
            )
            raise IncompleteUpdate(
                f"the update ended with {_count(waiting)} half arrived, first "
                f"{self._first_of(waiting)}. {remedy}Send every shard of a fused layer; the old "
                "weights are still served."
            )
        missing = [target for target in wanted if target not in update.arrived]
        if strict and missing:
            raise IncompleteUpdate(
                f"the update ended without {len(missing)} of the engine's parameters: "
                f"{some_of(missing)}. Send all of them, or pass strict=False to keep the old ones."
            )
        if not missing:
            self.refused.clear()
        _warn_of(missing, update.arrived)
        self._arrived.clear()

    def check_nothing_waits(self, wanted: Iterable[str]) -> None:
        """The trainer has sent everything it wanted to, in pushes outside a bracket.

        Args:
            wanted: every parameter of the engine's checkpoint.

        Raises:
            IncompleteUpdate: some layers have arrived in part, or were refused or dropped and
                never came again; they serve their old weights beside the new ones of others.

        """
        self._passes.close_for_good()
        if waiting := self.waiting():
            self._rest = frozenset(self._lacking(waiting))
            raise IncompleteUpdate(
                f"{len(waiting)} layers have arrived only in part and still serve their old "
                f"weights, beside the new ones of others: {self._first_of(waiting)}. Send what is "
                "missing, or everything anew."
            )
        # Said once: a name that no engine knows cannot come again, and must not bar the rest.
        if self.refused:
            refused, self.refused = self.refused, set()
            raise IncompleteUpdate(
                f"{len(refused)} tensors were in pushes that failed and have not come again, "
                f"{some_of(sorted(refused))}: the engine serves what it had of them, beside the "
                "new weights of others. Send them, or everything anew."
            )
        if self._unsaid:
            dropped = {layer: self.dropped[layer] for layer in self._unsaid}
            self._unsaid.clear()
            raise IncompleteUpdate(
                f"what had arrived of {_count(dropped)} was dropped when another sync seemed to "
                f"begin, and has not come again, first {_missing_parts(dropped)}. Old weights of "
                "it are served beside the new ones of others. Send everything anew."
            )
        _warn_of([target for target in wanted if target not in self._arrived], self._arrived)
        self._arrived.clear()

    def _first_of(self, waiting: Waiting) -> str:
        """The first layer that waits, and for which tensors, by their names in the checkpoint."""
        layer, parameters = next(iter(waiting.items()))
        lacks = self._lacking({layer: parameters})
        return f"{layer} lacks {some_of(lacks)}" if lacks else _missing_parts(waiting)

    def _lacking(self, waiting: Waiting) -> list[str]:
        """What layers wait for, by the names of the checkpoint; those that are known."""
        parameters = set(chain.from_iterable(waiting.values()))
        stages = {
            target: held.stage(target)
            for held in self._engine.layers
            for target in held.targets
            if target in parameters
        }
        return [
            name
            for name, targets in self._planner.landed.items()
            if not stages.keys().isdisjoint(targets)
            and any(
                step.target in stages and not stages[step.target].holds(step.target_view)
                for step in self._planner.plan[name].steps
            )
        ]

    def _drop_earlier(self, update: Update) -> None:
        """Another sync begins: forget what earlier pushes have brought in part."""
        for layer in self._engine.layers:
            stages = [layer.stage(target) for target in layer.targets]
            mine = [update.staged.get(stage, set()) for stage in stages]
            if any(stage.windows - own for stage, own in zip(stages, mine, strict=True)):
                update.dropped[layer.name] = layer.missing or layer.targets
                for stage, own in zip(stages, mine, strict=True):
                    stage.keep_only(own, update.undo)
        if self._calibration is not None:
            self._calibration.begin_anew(update.names)

    def _note_dropped(self, dropped: Waiting) -> None:
        """Say of each layer that a part of it came to nothing, and that it did again; no more."""
        self.dropped |= dropped
        self._unsaid |= dropped.keys()
        self._times_dropped.update(dropped.keys())
        times = self._times_dropped
        if first := {layer: dropped[layer] for layer in dropped if times[layer] == 1}:
            logger.warning(
                "a new update began while %d layers had arrived in part, of a push that failed or "
                "a trainer that went away; what waited is dropped, and they serve their old "
                "weights until all of their shards have come: %s",
                len(first),
                _missing_parts(first),
            )
        if second := {layer: dropped[layer] for layer in dropped if times[layer] == 2}:
            logger.warning(
                "%d layers have waited in two updates for shards that never came, and still "
                "serve their old weights: %s. If the trainer sends only what it trains, let it "
                "send by flashquant.reload_weights(..., strict=False), which keeps the rest; else "
                "send every shard.",
                len(second),
                _missing_parts(second),
            )


def _warn_of(missing: Sequence[str], arrived: Collection[str]) -> None:
    """A part of the model may be all that a trainer wants to send; or a bucket was lost."""
    if missing and arrived:
        logger.warning(
            "the update brought %d of %d parameters; the others keep what they had: %s. If the "
            "trainer sent everything, a bucket was lost on its way.",
            len(arrived),
            len(arrived) + len(missing),
            some_of(missing),
        )


def _count(layers: Collection[str]) -> str:
    return "1 layer" if len(layers) == 1 else f"{len(layers)} layers"


def _missing_parts(waiting: Waiting) -> str:
    """The first layer that waits, and for what."""
    layer, parameters = next(iter(waiting.items()))
    return f"{layer}: {some_of(parameters)} is not complete"
