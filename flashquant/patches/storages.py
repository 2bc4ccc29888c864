"""Which memory of a checkpoint-format layer is the memory that its kernels read.

Told by watching one processing of a twin, not from the names of kernels:

    rows    processing hands on the very memory, perhaps as a view (`weight.t()`): rows
            may be written where the kernels read them
    packed  other bytes are made of it: a stage, and the kernel's own packing of a twin
    hidden  something made of it is kept where flashquant does not look (`kernel_state`
            finds no way to it), so that it would go stale: the layer has to be refused

Limits
1. What is launched past torch's dispatcher (a Triton kernel on raw pointers) is not seen.
   Bytes that it changes in a parameter are, and so is memory that only it can have filled;
   what it adds to memory that torch has filled is not.
"""

from __future__ import annotations

import gc
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor, nn
from torch.multiprocessing.reductions import StorageWeakRef
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from flashquant.patches import kernel_state
from flashquant.trace import storage_of, tensors_in, written_by
from flashquant.verify import fingerprint

Kind = Literal["rows", "packed", "hidden"]

# Memory that nobody has written yet, or somebody past torch.
_FROM_ELSEWHERE = frozenset(
    {
        torch.ops.aten.empty.memory_format,
        torch.ops.aten.empty_like.default,
        torch.ops.aten.empty_strided.default,
        torch.ops.aten.new_empty.default,
        torch.ops.aten.new_empty_strided.default,
        torch.ops.aten.lift_fresh.default,  # of torch.from_numpy and torch.tensor
    }
)


@dataclass(frozen=True)
class Storage:
    """How one parameter of a layer is stored.

    Attributes:
        leaves: what the kernels read of it, as paths in `kernel_state`: the views of its
            memory where that is `rows`, else whatever was made of it.
        reason: why it is not `rows`.

    """

    kind: Kind
    leaves: tuple[str, ...] = ()
    reason: str = ""


def storages(twin: nn.Module, own: Mapping[str, Tensor]) -> dict[str, Storage]:
    """Process `twin`, and say of each of its parameters what became of its memory.

    Args:
        twin: a layer in checkpoint format; it is processed, and taken apart, by this call.
        own: its parameters by name, each in memory of its own, which this call may change.
            Their values count: where they are all zeros, a change in place may not show.

    """
    held = {storage_of(leaf) for _, leaf in _tensor_leaves(twin)}
    before = {name: fingerprint(tensor.detach()) for name, tensor in own.items()}
    watcher = _Watcher(own)
    with watcher:
        method: Any = twin.quant_method
        method.process_weights_after_loading(twin)
    made = _Made(twin, watcher, held)
    changed = {name for name, tensor in own.items() if fingerprint(tensor.detach()) != before[name]}
    found = {
        name: _storage(name, tensor, made, changed=name in changed) for name, tensor in own.items()
    }
    kernel_state.take_apart(twin)
    return found


def _storage(name: str, own: Tensor, made: _Made, *, changed: bool) -> Storage:
    if name in made.hidden:
        return Storage("hidden", made.of(name), made.hidden[name])
    views = [path for path, leaf in made.leaves if storage_of(leaf) == storage_of(own)]
    others = [path for path in made.of(name) if path not in views]
    if name in made.watcher.written:
        reason = f"{made.watcher.written[name]} writes into it"
    elif changed:
        reason = "its bytes change during processing"
    elif name in made.watcher.told:
        reason = f"{made.watcher.told[name]} takes it out of torch's sight"
    elif others:
        reason = f"{', '.join(others)} is made of it"
    elif not views:
        reason = "nothing that the kernels read is made of it"
    elif not all(_covers(leaf, own) for path, leaf in made.leaves if path in views):
        reason = f"{', '.join(views)} shows other bytes of it, or as another dtype"
    else:
        return Storage("rows", tuple(views))
    return Storage("packed", made.of(name), reason)


class _Made:
    """What a processed twin holds, and of which parameters it was made."""

    def __init__(self, twin: nn.Module, watcher: _Watcher, held: set[int]) -> None:
        self.watcher = watcher
        self.leaves = _tensor_leaves(twin)
        self._from = {path: self._origins(leaf, held) for path, leaf in self.leaves}
        in_sight = {storage_of(leaf) for _, leaf in self.leaves}
        self.hidden = watcher.kept_outside(in_sight)

    def of(self, name: str) -> tuple[str, ...]:
        """The leaves that are, or were made of, a parameter."""
        return tuple(path for path, origins in self._from.items() if name in origins)

    def _origins(self, leaf: Tensor, held: set[int]) -> frozenset[str]:
        storage = storage_of(leaf)
        unknown = not self.watcher.saw(storage) and storage not in held
        if unknown or storage in self.watcher.blank:
            return self.watcher.everything  # filled by something that cannot be watched
        return self.watcher.origins.get(storage, frozenset())


class _Watcher(TorchDispatchMode):  # type: ignore[no-untyped-call]  # torch leaves it untyped
    """Follows what is computed from parameters, storage by storage."""

    def __init__(self, own: Mapping[str, Tensor]) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.everything = frozenset(own)
        self.origins: dict[int, frozenset[str]] = {}
        self.written: dict[str, str] = {}  # parameter -> the operation that wrote into it
        self.told: dict[str, str] = {}  # parameter -> the operation that gave Python a value of it
        self.blank: set[int] = set()
        self._by: dict[int, str] = {}
        # An address is not used again while somebody holds a weak reference to its storage.
        self._seen: dict[int, StorageWeakRef] = {}
        for name, tensor in own.items():
            storage = self._note(tensor)
            self.origins[storage] = self.origins.get(storage, frozenset()) | {name}
        self._own = set(self.origins)

    def __torch_dispatch__(
        self,
        func: Any,
        types: Any,
        args: tuple[Any, ...] = (),
        kwargs: dict[str, Any] | None = None,
    ) -> Any:
        kwargs = kwargs or {}
        read = self._origins_of((args, kwargs))
        result = func(*args, **kwargs)
        results = [value for value in tree_leaves(result) if value is not None]
        written = [] if _only_views(func) else list(written_by(func, args, kwargs))
        for tensor in written:
            self._follow_write(func, tensor, read)
        for tensor in tensors_in(results):
            self._follow(func, tensor, read)
        if not (results or written) or not all(isinstance(value, Tensor) for value in results):
            self.told |= dict.fromkeys(read, str(func))
        return result

    def saw(self, storage: int) -> bool:
        """Whether an operation has made this storage, or been given it."""
        return storage in self._seen

    def kept_outside(self, in_sight: set[int]) -> dict[str, str]:
        """Parameters of which something is kept alive that is none of the storages in sight."""
        if self._outside(in_sight):
            gc.collect()  # a traceback or a cycle may hold what nobody means to keep
        return {
            name: f"what {self._by[storage]} made of it is kept where flashquant does not look"
            for storage in self._outside(in_sight)
            for name in self.origins[storage]
        }

    def _outside(self, in_sight: set[int]) -> list[int]:
        return [
            storage
            for storage in self.origins
            if storage not in self._own | in_sight and not self._seen[storage].expired()  # type: ignore[no-untyped-call]
        ]

    def _follow_write(self, func: Any, into: Tensor, read: frozenset[str]) -> None:
        storage = self._note(into)
        self.blank.discard(storage)
        if storage in self._own:
            self.written |= dict.fromkeys(self.origins[storage], str(func))
        if read:
            self.origins[storage] = self.origins.get(storage, frozenset()) | read
            self._by.setdefault(storage, str(func))

    def _follow(self, func: Any, tensor: Tensor, read: frozenset[str]) -> None:
        fresh = not self.saw(storage_of(tensor))
        storage = self._note(tensor)
        if fresh and func in _FROM_ELSEWHERE:
            self.blank.add(storage)
        elif fresh and read:
            self.origins[storage] = read
            self._by[storage] = str(func)

    def _note(self, tensor: Tensor) -> int:
        storage = storage_of(tensor)
        if storage not in self._seen:
            self._seen[storage] = StorageWeakRef(  # type: ignore[no-untyped-call]
                tensor.untyped_storage()
            )
        return storage

    def _origins_of(self, values: Any) -> frozenset[str]:
        found = (self.origins.get(storage_of(tensor)) for tensor in tensors_in(values))
        return frozenset().union(*(names for names in found if names))


def _only_views(func: Any) -> bool:
    """Whether an operation changes what a tensor shows, not what is in its memory."""
    return torch.Tag.inplace_view in func.tags


def _tensor_leaves(module: nn.Module) -> list[tuple[str, Tensor]]:
    leaves = kernel_state.leaves(module).items()
    return [(path, leaf) for path, leaf in leaves if isinstance(leaf, Tensor) and leaf.numel()]


def _covers(leaf: Tensor, own: Tensor) -> bool:
    """Whether two tensors of one storage show the same bytes, in whatever order of dimensions."""
    return (
        leaf.dtype == own.dtype
        and leaf.storage_offset() == own.storage_offset()
        and leaf.numel() == own.numel()
        and _is_dense(leaf)
        and _is_dense(own)
    )


def _is_dense(tensor: Tensor) -> bool:
    """Whether a tensor has no gaps and no overlaps."""
    expected = 1
    for stride, size in sorted(zip(tensor.stride(), tensor.shape, strict=True)):
        if size != 1 and stride != expected:
            return False
        expected *= size
    return True
