"""Has everything arrived? What layers wait for, and what was refused and never came again."""

from __future__ import annotations

import logging
from collections.abc import Collection, Iterable, Mapping, Sequence

from flashquant.engine import Engine, Layer
from flashquant.errors import IncompleteUpdate
from flashquant.report import some_of
from flashquant.update import Update

logger = logging.getLogger(__name__)


class Arrivals:
    """What one engine still has to be sent, as far as can be told."""

    def __init__(self, engine: Engine) -> None:
        self._engine = engine
        self._refused: set[str] = set()  # tensors
        self._arrived: set[str] = set()  # parameters, since the trainer last said that it was done

    def waiting(self, layers: Iterable[Layer] | None = None) -> dict[str, tuple[str, ...]]:
        """Of these layers, or of all, those that have arrived in part, and what each waits for."""
        some = self._engine.layers if layers is None else layers
        return {layer.name: missing for layer in some if (missing := layer.missing)}

    def note_refused(self, names: Iterable[str]) -> None:
        """A push outside a bracket failed, and its tensors with it."""
        self._refused |= set(names)

    def note_taken(self, names: Iterable[str], parameters: Iterable[str]) -> None:
        """These tensors came, again perhaps, and with them these parameters."""
        self._refused -= set(names)
        self._arrived |= set(parameters)

    def check_complete(self, update: Update, wanted: Iterable[str], *, strict: bool) -> None:
        """Refuse to close a bracket on half of a layer, or on half of the parameters.

        Args:
            wanted: every parameter of the engine's checkpoint.
            strict: all of them must have arrived.

        Raises:
            IncompleteUpdate: they have not; the bracket is rolled back.

        """
        if waiting := self.waiting(update.waiting.values()):
            raise IncompleteUpdate(
                f"the update ended with {len(waiting)} layers half arrived, first "
                f"{_missing_parts(waiting)}. Send every shard of a fused layer; the old weights "
                "are still served."
            )
        missing = [target for target in wanted if target not in update.arrived]
        if strict and missing:
            raise IncompleteUpdate(
                f"the update ended without {len(missing)} of the engine's parameters: "
                f"{some_of(missing)}. Send all of them, or pass strict=False to keep the old ones."
            )
        _warn_of(missing, update.arrived)
        self._arrived.clear()

    def check_nothing_waits(self, wanted: Iterable[str]) -> None:
        """The trainer has sent everything it wanted to, in pushes outside a bracket.

        Args:
            wanted: every parameter of the engine's checkpoint.

        Raises:
            IncompleteUpdate: some layers have arrived in part, or were refused and never
                came again; they serve their old weights beside the new ones of others.

        """
        if waiting := self.waiting():
            raise IncompleteUpdate(
                f"{len(waiting)} layers have arrived only in part and still serve their old "
                f"weights, beside the new ones of others: {_missing_parts(waiting)}. Send what is "
                "missing, or everything anew."
            )
        # Said once: a name that no engine knows cannot come again, and must not bar the rest.
        if self._refused:
            refused, self._refused = self._refused, set()
            raise IncompleteUpdate(
                f"{len(refused)} tensors were in pushes that failed and have not come again, "
                f"{some_of(sorted(refused))}: the engine serves what it had of them, beside the "
                "new weights of others. Send them, or everything anew."
            )
        _warn_of([target for target in wanted if target not in self._arrived], self._arrived)
        self._arrived.clear()


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


def _missing_parts(waiting: Mapping[str, tuple[str, ...]]) -> str:
    """The first layer that waits, and for what."""
    layer, parameters = next(iter(waiting.items()))
    return f"{layer}: {some_of(parameters)} is not complete"
