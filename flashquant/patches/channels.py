"""What flashquant hands itself across vLLM's own code, where no argument can go.

Ambient values, for the time of a block, from who calls vLLM to a function of vLLM that is wrapped:

    flashquant_maxima     maxima of whole tensors      layers/tensor_parallel_maxima.py
    flashquant_scales     live scales of handlers      layers/cpu.py
    flashquant_packed     handlers of shared weights   layers/cpu.py
    flashquant_towers     towers of a new model        seams/towers.py
    flashquant_reception  a refusal that waits         seams/receiving.py

Attributes, on vLLM's own objects, from one call of vLLM's to a later one: all are defined here.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from typing import Any, Generic, NamedTuple, TypeVar
from weakref import ReferenceType

from torch import Tensor

from flashquant.config.schema import RolloutConfig
from flashquant.update import Update

T = TypeVar("T")


class Ambient(Generic[T]):
    """A value that is there while a block runs; None outside of it."""

    def __init__(self, name: str) -> None:
        self._variable: ContextVar[T | None] = ContextVar(name, default=None)

    def get(self) -> T | None:
        """The value of the innermost block that is running."""
        return self._variable.get()

    @contextmanager
    def given(self, value: T) -> Iterator[None]:
        """Run a block with this value."""
        before = self._variable.set(value)
        try:
            yield
        finally:
            self._variable.reset(before)


class Attribute(Generic[T]):
    """A value of flashquant's in the dictionary of one of vLLM's objects, under one name."""

    def __init__(self, name: str) -> None:
        self._name = name

    def put(self, owner: object, value: T) -> T:
        """Keep a value, in the place of any other; returns it."""
        vars(owner)[self._name] = value
        return value

    def of(self, owner: object) -> T:
        """The value that was put there.

        Raises:
            KeyError: none was.

        """
        value: T = vars(owner)[self._name]
        return value

    def get(self, owner: object) -> T | None:
        """The value that was put there, if any."""
        value: T | None = vars(owner).get(self._name)
        return value

    def take(self, owner: object) -> T | None:
        """The value that was put there, if any; it is there no more."""
        value: T | None = vars(owner).pop(self._name, None)
        return value


# Of `EngineArgs`: the entry of FLASHRL_CONFIG they are for, whatever the rank. A front end puts it
# on the arguments of each replica (remote/replicas.py); `create_model_config` reads it.
ENTRY = Attribute[RolloutConfig]("flashquant_entry")

# Of `VllmConfig`: the configurations of all replicas. It travels to their processes with the
# configuration, where each replica picks its own (remote/replicas.py).
REPLICAS = Attribute[list[Any]]("flashquant_replicas")


class Feed(NamedTuple):
    """What is still to come of an update that is taken in slices.

    Attributes:
        word: of the caller that began it.
        update: that was begun.
        tensors: of it.

    """

    word: str
    update: ReferenceType[Update]
    tensors: Iterator[tuple[str, Tensor]]


# Of a worker: from `flashquant_begin` to the next one (seams/worker.py).
FEED = Attribute[Feed]("_flashquant_feed")

# Of a worker: the update that was begun by `start_weight_update`, until its end (seams/reload.py).
STARTED = Attribute[ReferenceType[Update]]("_flashquant_started")

# Of a worker: a digest that is taken in slices, from one `flashquant_digest` to the next.
DIGESTING = Attribute[Iterator[str | None]]("_flashquant_digesting")

# Of a model runner: it has emptied its half of the encoder cache since the engine core last asked
# (seams/loading.py).
FORGOT = Attribute[bool]("_flashquant_forgot")

# Of a worker: its KV cache is asleep, or was discarded (seams/sleep.py).
CACHE_AWAY = Attribute[bool]("_flashquant_cache_away")

# Of a `SchedulerOutput`: the requests for which its step has sampled under weights that are no more
# (seams/ahead.py).
STALE = Attribute[set[str]]("_flashquant_stale")

# Of an engine core: what it last learned of its workers' weights (seams/engine_core.py).
NOTED = Attribute[Any]("_flashquant")
