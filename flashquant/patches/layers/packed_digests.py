"""Fingerprints of what cannot be read any more once it is live.

A oneDNN handler owns memory that no tensor shows. The digest of an engine covers it all the same:
by the fingerprints of the parameters it was packed from.
"""

from __future__ import annotations

import functools
from collections.abc import Collection, Iterator, Mapping, Sequence

from torch import Tensor

from flashquant.patches.layers import kernel_state
from flashquant.patches.layers.blueprint import LayerBlueprint
from flashquant.update import UndoLog, digests


class PackedDigests:
    """The fingerprints of one layer's parameters, by parameter, as they were packed.

    They are taken before the layer is (`look_at`), and noted with an undo log when it goes live
    (`note`). Parameters whose live bytes can be read are left out: it would be a pass for nothing.

    Args:
        blueprints: the modules of the layer.
        loaded: the fingerprint of each parameter as it was loaded, empty where none was taken.
        compared: parameters that are fingerprinted whether packed or not: what comes under their
            other names is compared with them.

    """

    def __init__(
        self,
        blueprints: Sequence[LayerBlueprint],
        loaded: Mapping[str, str],
        compared: Collection[str] = (),
    ) -> None:
        self._blueprints = blueprints
        self._live = dict(loaded)
        self._coming: dict[str, str] = {}
        self._compared = compared

    @functools.cached_property
    def is_packed(self) -> bool:
        """Whether kernels read memory whose bytes cannot be seen."""
        return any(holds_handles(blueprint) for blueprint in self._blueprints)

    def of(self, target: str) -> str:
        """The fingerprint of a parameter that is live."""
        return self._live[target]

    def coming(self, target: str) -> str | None:
        """The fingerprint of a parameter that is prepared; None where none was taken."""
        return self._coming.get(target)

    def look_at(self, staged: Mapping[str, Tensor]) -> None:
        """Take the fingerprints of what is about to go live, by parameter."""
        wanted = {t: v for t, v in staged.items() if self.is_packed or t in self._compared}
        self._coming = digests(wanted.items())

    def note(self, undo: UndoLog) -> None:
        """What was looked at goes live; an undo log keeps the fingerprints from before."""
        for target, value in self._coming.items():
            before = self._live[target]
            undo.remember_how(functools.partial(self._live.__setitem__, target, before))
            self._live[target] = value
        self.drop()

    def drop(self) -> None:
        """What was looked at does not go live."""
        self._coming = {}

    def contents(self, blueprint: LayerBlueprint) -> Iterator[tuple[str, str]]:
        """What stands for the packed memory of a module, by the full names of its parameters."""
        if holds_handles(blueprint):
            for name, target in blueprint.targets.items():
                yield f"{blueprint.name}.<packed>.{name}", self._live[target]


def holds_handles(blueprint: LayerBlueprint) -> bool:
    """Whether kernels read memory of a module that no tensor shows."""
    leaves = kernel_state.leaves(blueprint.module).values()
    return not all(isinstance(leaf, Tensor) for leaf in leaves)
