"""Watch the engine load one set of tensors, and note what it does with them.

The engine's own loader is the only authority on where a checkpoint tensor
lands: fusing, sharding and renaming are its business. So it runs on meta
tensors, with the model's parameters on meta too, while a dispatch mode notes
each write. Nothing is allocated and no live tensor is in reach.

Limits
1. A loader that reads values (`.item()`, data-dependent branches) cannot run on
   meta tensors; the error of the loader is passed on under the tensor's name.
2. A write that is neither a view copied nor a constant becomes a `Replay`.
3. A loader that waits for a second tensor before it writes the first (codes in fp8 for their
   scales) cannot take one by itself; both are refused by name.
"""

from __future__ import annotations

import contextlib
import gc
from collections.abc import Callable, Iterable, Iterator, Mapping
from typing import Any

import torch
from torch import Tensor
from torch.multiprocessing.reductions import StorageWeakRef
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from flashquant.errors import ReloadError, UnknownWeight
from flashquant.plan.writes import Fill, Replay, Step, TensorPlan, View, Write

Load = Callable[[Iterable[tuple[str, Tensor]]], object]

# What loaders of every engine version raise for a name or a shape they do not
# accept; anything else is a bug worth its own traceback.
_REFUSALS = (
    AssertionError,
    AttributeError,
    IndexError,
    KeyError,
    RuntimeError,
    TypeError,
    ValueError,
)
_COPY = torch.ops.aten.copy_.default
_CONSTANTS = {
    torch.ops.aten.fill_.Scalar: lambda args: float(args[1]),
    torch.ops.aten.zero_.default: lambda args: 0.0,
}


def trace(
    load: Load, incoming: Mapping[str, Tensor], targets: Mapping[str, Tensor]
) -> dict[str, TensorPlan]:
    """Run `load` over `incoming` and return the plan of every name it accepts.

    A name that the loader refuses is left out, so that one odd tensor does not
    stand in the way of the others; `trace_one` says why it is refused.

    Args:
        load: the engine's loader; writes into `targets` as a side effect.
        incoming: meta tensors under the trainer's names, contiguous.
        targets: the parameters the loader may write, on meta, under their names.

    """
    with contextlib.suppress(*_REFUSALS, ReloadError):
        return _watch(load, incoming, targets)
    # Loaders read ahead (grouping by prefix), so only runs of their own tell
    # which of them was refused.
    plans: dict[str, TensorPlan] = {}
    for name, tensor in incoming.items():
        with contextlib.suppress(ReloadError):
            plans |= trace_one(load, name, tensor, targets)
    return plans


def trace_one(
    load: Load, name: str, tensor: Tensor, targets: Mapping[str, Tensor]
) -> dict[str, TensorPlan]:
    """As `trace`, for one tensor, with a refusal dressed in the tensor's name.

    Raises:
        UnknownWeight: the loader knows no parameter of that name.
        ReloadError: the loader refused the tensor, or did something with it that
            a plan cannot say.

    """
    try:
        return _watch(load, {name: tensor}, targets)
    except ReloadError:
        raise
    except _REFUSALS as refusal:
        if isinstance(refusal, KeyError) or "no module or parameter named" in str(refusal):
            raise UnknownWeight(f"the engine's loader knows no weight {name!r}") from refusal
        said = f"{type(refusal).__name__}: {refusal}" if str(refusal) else type(refusal).__name__
        raise ReloadError(
            f"the engine's loader refused {name!r} with shape {tuple(tensor.shape)} ({said})"
        ) from refusal


def replay(load: Load, entry: TensorPlan, tensor: Tensor, memory: Mapping[str, Tensor]) -> None:
    """Let the loader write a tensor for real, where it wrote when it was watched.

    Args:
        load: the engine's loader; writes into `memory`.
        entry: the plan of the tensor.
        tensor: under the trainer's name.
        memory: real tensors in place of the parameters that the plan speaks of.

    Raises:
        ReloadError: it leaves something out: that depends on other tensors, too.

    """
    watcher = _Watcher({entry.name: tensor}, memory)
    with watcher:
        load([(entry.name, tensor)])
    written = {(step.target, step.target_view) for step in watcher.steps[entry.name]}
    for step in entry.steps:
        if (step.target, step.target_view) not in written:
            raise ReloadError(_waits(entry.name, f"did not write {step.target!r} of it"))


def _watch(
    load: Load, incoming: Mapping[str, Tensor], targets: Mapping[str, Tensor]
) -> dict[str, TensorPlan]:
    homes = {name: (target.data, storage_of(target)) for name, target in targets.items()}
    # Tensors of our own: what is left of them afterwards, the loader has kept.
    handed = {name: torch.empty_like(tensor) for name, tensor in incoming.items()}
    left = {name: _Left(tensor) for name, tensor in handed.items()}
    watcher = _Watcher(handed, targets)
    with watcher:
        load(iter(list(handed.items())))
    for name, (data, storage) in homes.items():
        if storage_of(targets[name]) != storage:
            targets[name].data = data
            raise ReloadError(
                f"the engine's loader replaced the memory of {name!r} instead of writing into it; "
                "flashquant cannot reload this parameter in place"
            )
    steps = watcher.steps
    del watcher, handed
    unwritten = {name: left[name] for name in incoming if not steps[name]}
    if kept := _kept(unwritten):
        raise ReloadError(_waits(kept[0], "kept it for a later call"))
    return {
        name: TensorPlan(name, tuple(tensor.shape), tensor.dtype, tuple(steps[name]))
        for name, tensor in incoming.items()
    }


class _Left:
    """Whether anybody still holds the memory of a tensor."""

    def __init__(self, tensor: Tensor) -> None:
        self._storage: Any = StorageWeakRef(tensor.untyped_storage())  # type: ignore[no-untyped-call]

    def is_held(self) -> bool:
        return not self._storage.expired()


def _kept(tensors: Mapping[str, _Left]) -> list[str]:
    """Those that somebody still holds: a loader that has neither written nor dropped them."""
    if any(left.is_held() for left in tensors.values()):
        gc.collect()  # a loader's own frames may have held each other
    return [name for name, left in tensors.items() if left.is_held()]


def _waits(name: str, how: str) -> str:
    return (
        f"the engine's loader takes {name!r} together with another tensor only (by itself, it "
        f"{how}), and flashquant takes each by itself. Such loaders wait for the scales of codes: "
        "start the engine on a checkpoint in bf16, or unset FLASHRL_CONFIG to serve this one "
        "unpatched."
    )


class _Watcher(TorchDispatchMode):  # type: ignore[no-untyped-call]  # torch leaves it untyped
    """Notes every write into a target, and which incoming tensor it came from."""

    def __init__(self, incoming: Mapping[str, Tensor], targets: Mapping[str, Tensor]) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.steps: dict[str, list[Step]] = {name: [] for name in incoming}
        self._incoming = dict(incoming)
        self._dtypes = {name: target.dtype for name, target in targets.items()}
        self._origins = {storage_of(tensor): frozenset([name]) for name, tensor in incoming.items()}
        self._verbatim = {storage_of(tensor): name for name, tensor in incoming.items()}
        self._targets = {storage_of(tensor): name for name, tensor in targets.items()}
        self._writers: dict[str, frozenset[str]] = {}
        self._made_by: dict[int, str] = {}
        # Storages are told apart by address; what is noted must not be freed.
        self._alive: list[Tensor] = []

    def __torch_dispatch__(
        self,
        func: Any,
        types: Any,
        args: tuple[Any, ...] = (),
        kwargs: dict[str, Any] | None = None,
    ) -> Any:
        kwargs = kwargs or {}
        for tensor in written_by(func, args, kwargs):
            if storage_of(tensor) in self._targets:
                self._note(func, tensor, args)
            # An incoming tensor that was changed is not what the trainer sent.
            self._verbatim.pop(storage_of(tensor), None)
        result = func(*args, **kwargs)
        self._inherit(func, args, kwargs, result)
        return result

    def _note(self, func: Any, into: Tensor, args: tuple[Any, ...]) -> None:
        target = self._targets[storage_of(into)]
        if into.dtype != self._dtypes[target]:
            raise ReloadError(
                f"the engine's loader writes {target!r} ({self._dtypes[target]}) through a view of "
                f"dtype {into.dtype}, which a plan cannot say"
            )
        if func in _CONSTANTS:
            self._note_constant(target, View.of(into), _CONSTANTS[func](args))
            return
        source = self._source_of(args[1]) if func is _COPY else None
        if source is not None and args[1].shape == into.shape:
            self.steps[source].append(Write(source, View.of(args[1]), target, View.of(into)))
            self._writers[target] = frozenset([source])
            return
        origins = self._origins_of(args) or self._writers.get(target, frozenset())
        if not origins:
            raise ReloadError(f"the engine's loader wrote {target!r} from nothing it was given")
        if len(origins) > 1:
            first, *others = sorted(origins)
            raise ReloadError(_waits(first, f"does not make {target!r}: that takes {others[0]!r}"))
        reason = self._made_by.get(storage_of(args[1]), str(func)) if func is _COPY else str(func)
        for origin in origins:
            self.steps[origin].append(Replay(origin, target, View.of(into), reason))
        self._writers[target] = origins

    def _note_constant(self, target: str, window: View, value: float) -> None:
        """Padding belongs to the tensor that was copied next to it."""
        if target not in self._writers:
            raise ReloadError(
                f"the engine's loader fills {target!r} before it copies into it, so a plan cannot "
                "say which tensor the constant belongs to"
            )
        for name in self._writers[target]:
            self.steps[name].append(Fill(target, window, value))

    def _source_of(self, incoming: Any) -> str | None:
        """The incoming tensor this is a plain window of, or None."""
        name = self._verbatim.get(storage_of(incoming)) if isinstance(incoming, Tensor) else None
        return name if name is not None and incoming.dtype == self._incoming[name].dtype else None

    def _inherit(
        self, func: Any, args: tuple[Any, ...], kwargs: dict[str, Any], result: Any
    ) -> None:
        """A tensor computed from an incoming one still comes from it."""
        origins = self._origins_of((args, kwargs))
        for tensor in tensors_in(result):
            storage = storage_of(tensor)
            if not origins or storage in self._targets:
                continue
            if storage not in self._origins:
                self._made_by[storage] = str(func)
            self._alive.append(tensor)
            self._origins[storage] = self._origins.get(storage, frozenset()) | origins

    def _origins_of(self, values: Any) -> frozenset[str]:
        found = (self._origins.get(storage_of(tensor)) for tensor in tensors_in(values))
        return frozenset().union(*(names for names in found if names))


def written_by(func: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Iterator[Tensor]:
    """The tensors an operation changes, by its own schema."""
    for position, argument in enumerate(func._schema.arguments):
        if argument.alias_info is None or not argument.alias_info.is_write:
            continue
        value = args[position] if position < len(args) else kwargs.get(argument.name)
        yield from tensors_in(value)


def tensors_in(values: Any) -> Iterator[Tensor]:
    """Every tensor in nested arguments or results of an operation."""
    return (leaf for leaf in tree_leaves(values) if isinstance(leaf, Tensor))


def storage_of(tensor: Tensor) -> int:
    """What tells storages apart, on meta too, as long as they are alive."""
    return int(tensor.untyped_storage()._cdata)
