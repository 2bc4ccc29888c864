"""What becomes of the parameters of a layer while vLLM processes it, found by watching.

Storages are told apart by address. A weak reference keeps an address from being used again,
and tells whether anything still holds what was there; the memory itself is not kept.
"""

from __future__ import annotations

import gc
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor
from torch.multiprocessing.reductions import StorageWeakRef
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from flashquant.plan import View, storage_of, tensors_in, written_by

# Memory that nothing has written yet, or something past torch.
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


# What may be done to a parameter without making anything new of it.
_COPIES = frozenset(
    {
        torch.ops.aten.detach.default,
        torch.ops.aten.alias.default,
        torch.ops.aten._to_copy.default,
    }
)


class Provenance(TorchDispatchMode):  # type: ignore[no-untyped-call]  # torch leaves it untyped
    """Follows what is computed from parameters, storage by storage.

    Attributes:
        of: storage -> the parameters that what is in it was made of.
        copy_of: storage -> the parameter that it holds, as it was or in another dtype.
        used: parameters to which, or to a copy of which, anything else than copying was done.
        written: parameter -> the operation that wrote into it.
        read_out: parameter -> the operation that gave something else than a tensor of it.
        blank: storages that were allocated, and written by nothing that could be seen.

    """

    def __init__(self, own: Mapping[str, Tensor]) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.everything = frozenset(own)
        self.of: dict[int, frozenset[str]] = {}
        self.copy_of: dict[int, str] = {}
        self.used: set[str] = set()
        self.written: dict[str, str] = {}
        self.read_out: dict[str, str] = {}
        self.blank: set[int] = set()
        self._by: dict[int, str] = {}
        self._seen: dict[int, StorageWeakRef] = {}
        for name, tensor in own.items():
            storage = self._note(tensor)
            self.of[storage] = self.of.get(storage, frozenset()) | {name}
            self.copy_of[storage] = name
        self._own = set(self.of)

    def __torch_dispatch__(
        self,
        func: Any,
        types: Any,
        args: tuple[Any, ...] = (),
        kwargs: dict[str, Any] | None = None,
    ) -> Any:
        kwargs = kwargs or {}
        read = self._made_of((args, kwargs))
        result = func(*args, **kwargs)
        results = [value for value in tree_leaves(result) if value is not None]
        unchanged = _only_views(func) or _copies_onto_itself(func, args)
        written = [] if unchanged else list(written_by(func, args, kwargs))
        came_from = read | self._unknown_of((args, kwargs), written)
        for tensor in written:
            self._follow_write(func, tensor, came_from)
        for tensor in tensors_in(results):
            self._follow(func, tensor, came_from)
        if not (results or written) or not all(isinstance(value, Tensor) for value in results):
            self.read_out |= dict.fromkeys(read, str(func))
        self._follow_copies(func, (args, kwargs), results)
        return result

    def saw(self, storage: int) -> bool:
        """Whether an operation has made this storage, or been given it."""
        return storage in self._seen

    def kept_outside(self, in_sight: set[int]) -> dict[str, str]:
        """Parameters of which something is kept alive that is none of the storages in sight."""
        if self._outside(in_sight):
            gc.collect()  # a traceback or a cycle may hold what is not meant to be kept
        return {
            name: f"what {self._by[storage]} made of it is kept where flashquant does not look"
            for storage in self._outside(in_sight)
            for name in self.of[storage]
        }

    def _outside(self, in_sight: set[int]) -> list[int]:
        return [
            storage
            for storage in self.of
            if storage not in self._own | in_sight and not self._seen[storage].expired()  # type: ignore[no-untyped-call]
        ]

    def _follow_copies(self, func: Any, values: Any, results: list[Any]) -> None:
        """Note what a copy of a parameter is used for, unless it is copied once more."""
        found = (self.copy_of.get(storage_of(tensor)) for tensor in tensors_in(values))
        copied = {name for name in found if name is not None}
        if func not in _COPIES:
            self.used |= copied
        elif len(copied) == 1:
            (name,) = copied
            self.copy_of |= {self._note(tensor): name for tensor in tensors_in(results)}

    def _follow_write(self, func: Any, into: Tensor, read: frozenset[str]) -> None:
        storage = self._note(into)
        self.blank.discard(storage)
        if storage in self._own:
            self.written |= dict.fromkeys(self.of[storage], str(func))
        if read:
            self.of[storage] = self.of.get(storage, frozenset()) | read
            self._by.setdefault(storage, str(func))

    def _follow(self, func: Any, tensor: Tensor, read: frozenset[str]) -> None:
        fresh = not self.saw(storage_of(tensor))
        storage = self._note(tensor)
        if fresh and func in _FROM_ELSEWHERE:
            self.blank.add(storage)
        elif fresh and read:
            self.of[storage] = read
            self._by[storage] = str(func)

    def _note(self, tensor: Tensor) -> int:
        storage = storage_of(tensor)
        if storage not in self._seen:
            self._seen[storage] = StorageWeakRef(  # type: ignore[no-untyped-call]
                tensor.untyped_storage()
            )
        return storage

    def _unknown_of(self, values: Any, written: list[Tensor]) -> frozenset[str]:
        """What is read from memory that was filled past torch may come from anything."""
        # A single number is a constant, as `torch.tensor(448.0)`.
        read = {storage_of(tensor) for tensor in tensors_in(values) if tensor.numel() > 1}
        read -= {storage_of(tensor) for tensor in written}
        return self.everything if read & self.blank else frozenset()

    def _made_of(self, values: Any) -> frozenset[str]:
        found = (self.of.get(storage_of(tensor)) for tensor in tensors_in(values))
        return frozenset().union(*(names for names in found if names))


def _only_views(func: Any) -> bool:
    """Whether an operation changes what a tensor shows, not what is in its memory."""
    return torch.Tag.inplace_view in func.tags


def _copies_onto_itself(func: Any, args: tuple[Any, ...]) -> bool:
    """Whether a tensor is copied to where it is, as `replace_parameter` does with one kept."""
    if func is not torch.ops.aten.copy_.default:
        return False
    into, source = args[:2]
    return storage_of(into) == storage_of(source) and View.of(into) == View.of(source)
