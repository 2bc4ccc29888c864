"""What the planner asks of a serving model: its own loader, and what that writes into."""

from __future__ import annotations

from collections.abc import Collection, Mapping
from contextlib import AbstractContextManager
from typing import Protocol

from torch import Tensor

from flashquant.plan.weights import NamedTensors


class Loader(Protocol):
    """The loader of a serving model and its checkpoint-format parameters."""

    @property
    def targets(self) -> Mapping[str, Tensor]:
        """Checkpoint-format parameters, on meta: what its loader writes into; and `optional`."""
        ...

    @property
    def optional(self) -> Collection[str]:
        """The targets that are buffers, of which a checkpoint may bring some: no update has to
        fill one unless the checkpoint did."""
        ...

    @property
    def stored(self) -> Mapping[str, Tensor]:
        """The same as stages hold them, on meta: codes where a layer takes codes of floats, and
        the scales beside them, `<parameter>_scale`."""
        ...

    @property
    def tied(self) -> Mapping[str, str]:
        """The other names of parameters that the model holds once, and under which it does."""
        ...

    def load(self, weights: NamedTensors) -> object: ...
    def laid_out(
        self, values: Mapping[str, Tensor] | None = None
    ) -> AbstractContextManager[None]: ...
    def apart(self) -> AbstractContextManager[Mapping[str, Tensor]]:
        """While a loader is watched: all parameters on meta, a tied one under each of its names."""
        ...
