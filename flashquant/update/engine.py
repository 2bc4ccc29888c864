"""What a session asks of a serving model, and of each of its layers.

`patches.engine` and `patches.layers` answer with vLLM; a test answers with ten
lines of torch.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from enum import Enum
from typing import Protocol

import torch
from torch import Tensor

from flashquant.plan import Fill, Loader, TensorPlan, Write
from flashquant.update.staging import Stage
from flashquant.update.status import WhyInBf16
from flashquant.update.undo import UndoLog


class Reach(Enum):
    """How far an update may reach into live memory before its layer is complete.

    NOTHING  it is prepared while the engine generates
    WHOLE    a push by itself: what arrives whole, and needs nothing else
    PARTS    a bracket: no step runs before it is closed, and the undo log knows the rest
    """

    NOTHING = 0
    WHOLE = 1
    PARTS = 2


class Layer(Protocol):
    """One live layer: the modules whose weights arrive, and go live, together."""

    @property
    def name(self) -> str: ...
    @property
    def placement(self) -> str:
        """`direct` or `staged`, as `Status` lists it."""
        ...

    @property
    def targets(self) -> tuple[str, ...]: ...
    @property
    def device(self) -> torch.device: ...
    @property
    def missing(self) -> tuple[str, ...]: ...
    @property
    def ready(self) -> bool: ...
    @property
    def homes(self) -> Mapping[str, Tensor]:
        """Live memory, laid out as rows arrive, by target; only of what may be filled there."""
        ...

    @property
    def editable(self) -> Mapping[str, Tensor]:
        """The same, of what may be overwritten there in a bracket if `refresh` follows."""
        ...

    def refresh(self, targets: Iterable[str], undo: UndoLog) -> int:
        """Make anew what is made of parameters that were overwritten where they are live; the
        bytes that took."""
        ...

    def stage(self, target: str) -> Stage: ...
    def held(self, target: str) -> Tensor | str:
        """What has arrived of a parameter, or else is live, in checkpoint format; its fingerprint
        where no tensor shows it."""
        ...

    def move_in(self, target: str, undo: UndoLog) -> bool:
        """Fill a parameter in its home until its layer is complete; an undo log keeps what is
        there. False where that is not to be, or it is being filled elsewhere."""
        ...

    def window(self, step: Write | Fill, undo: UndoLog, reach: Reach) -> Tensor:
        """The memory that one step fills, staged or live; an undo log keeps what is live."""
        ...

    def receive(
        self,
        step: Write | Fill,
        incoming: Tensor,
        undo: UndoLog,
        reach: Reach,
        maxima: Tensor | None,
    ) -> None: ...
    def drop(self) -> None:
        """Forget what has arrived, and what was prepared."""
        ...

    def keep_rest(self) -> None:
        """Take what is missing of parameters that have arrived in part from what is live of them,
        if their rows can be kept, codes with their scales; do nothing where they cannot."""
        ...

    def prepare(self, undo: UndoLog) -> None:
        """Make everything that `commit` will need, and touch nothing that is live."""
        ...

    def commit(self, undo: UndoLog) -> int:
        """Make what has arrived, or was prepared, live; the bytes that took."""
        ...

    def tensors(self) -> Iterator[tuple[str, Tensor]]: ...
    def contents(self) -> Iterator[tuple[str, Tensor | str]]: ...


KVScales = Mapping[str, tuple[float, float]]
"""Of keys and of values, by the name of an attention layer."""


class CacheScales(Protocol):
    """The scales of a KV cache in fp8, which belong to a policy as its weights do."""

    def contents(self) -> Iterator[tuple[str, Tensor]]: ...
    def check(self, scales: KVScales) -> None:
        """Raise ReloadError where they could not be set."""
        ...

    def set(self, scales: KVScales, undo: UndoLog) -> None:
        """Write scales that have been checked."""
        ...

    def restore(self) -> None:
        """Write those that were set last once more, where the engine may have lost them."""
        ...


class Engine(Loader, Protocol):
    """The serving model: its own loader, its checkpoint-format parameters, its layers."""

    def place(self, plan: TensorPlan, values: Tensor) -> None:
        """While the checkpoint is loaded: write a tensor where its plan says, by no loader."""
        ...

    def make_anew(self, undo: UndoLog) -> None:
        """Make anew what modules have made of their weights by themselves, and keep: the layers of
        an update are live. An undo log keeps what was there."""
        ...

    @property
    def scheme(self) -> str:
        """Of all layers but those that `overrides` names."""
        ...

    @property
    def overrides(self) -> Mapping[str, str]:
        """The modules of the checkpoint that are stored in another scheme, and in which."""
        ...

    @property
    def device(self) -> torch.device: ...
    @property
    def layers(self) -> Sequence[Layer]: ...
    @property
    def in_bf16(self) -> Mapping[str, WhyInBf16]:
        """The linear layers and experts of the checkpoint that stay in bf16, and why."""
        ...

    @property
    def cache_scales(self) -> CacheScales:
        """Those of its KV cache."""
        ...

    @property
    def is_alone(self) -> bool:
        """Whether no other worker holds a part of the same model: experts, a stage, shards."""
        ...

    @property
    def shares_scales(self) -> bool:
        """Whether scales span the shards of other workers: maxima of whole tensors are wanted."""
        ...


def scheme_of(name: str, engine: Engine) -> str:
    """The scheme that a tensor of the checkpoint is stored in, if it is quantized."""
    return engine.overrides.get(name.rpartition(".")[0], engine.scheme)
