"""What a session asks of a serving model, and of each of its layers.

`patches.engine` and `patches.layers` answer with vLLM; a test answers with ten
lines of torch.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import AbstractContextManager
from typing import Protocol

import torch
from torch import Tensor

from flashquant.plan import Fill, Write
from flashquant.undo import UndoLog
from flashquant.weights import NamedTensors
from flashquant.write import Stage


class Layer(Protocol):
    """One live layer: the modules whose weights arrive, and go live, together."""

    @property
    def name(self) -> str: ...
    @property
    def road(self) -> str: ...
    @property
    def targets(self) -> tuple[str, ...]: ...
    @property
    def device(self) -> torch.device: ...
    @property
    def missing(self) -> tuple[str, ...]: ...
    @property
    def ready(self) -> bool: ...
    def stage(self, target: str) -> Stage: ...
    def receive(
        self, step: Write | Fill, incoming: Tensor, undo: UndoLog, maxima: Tensor | None
    ) -> None: ...
    def drop(self) -> None: ...
    def commit(self, undo: UndoLog) -> int: ...
    def tensors(self) -> Iterator[tuple[str, Tensor]]: ...
    def contents(self) -> Iterator[tuple[str, Tensor | str]]: ...


class Engine(Protocol):
    """The serving model: its own loader, its checkpoint-format parameters, its layers."""

    @property
    def scheme(self) -> str: ...
    @property
    def device(self) -> torch.device: ...
    @property
    def targets(self) -> Mapping[str, Tensor]:
        """Checkpoint-format parameters, on meta."""
        ...

    @property
    def layers(self) -> Sequence[Layer]: ...
    @property
    def shares_scales(self) -> bool:
        """Whether scales span the shards of other workers: maxima of whole tensors are wanted."""
        ...

    def load(self, weights: NamedTensors) -> object: ...
    def laid_out(
        self, values: Mapping[str, Tensor] | None = None
    ) -> AbstractContextManager[None]: ...
