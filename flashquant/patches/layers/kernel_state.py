"""What the kernels of one layer read: every tensor and handle it holds, by path.

vLLM keeps processed weights in parameters, buffers and plain attributes, but
also in the closures behind CPU linears and in the oneDNN handlers
that own memory no tensor shows. One walk finds them all, and serves three
purposes: carrying fresh values into the live layer, the ledger of addresses,
and the digest.

    weight_scale                       Tensor
    cpu_linear<handler>                CPUDNNLGEMMHandler
    scheme.kernel.dnnl_handler         CPUDNNLGEMMHandler
"""

from __future__ import annotations

import functools
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field
from types import FunctionType
from typing import Protocol, TypeGuard

from torch import Tensor, nn
from vllm._custom_ops import CPUDNNLGEMMHandler
from vllm.model_executor.layers.quantization.base_config import QuantizeMethodBase

from flashquant.errors import ReloadError
from flashquant.update import UndoLog


class Handle(Protocol):
    """vLLM's `CPUDNNLGEMMHandler`: owns a oneDNN matmul and the weight packed inside it."""

    handler_tensor: Tensor  # int64, one element: the address of the native object
    k: int
    n: int


Leaf = Tensor | Handle

# What nn.Module itself keeps in an instance; tensors are walked by their own dicts.
_MODULE_INTERNALS = frozenset(vars(nn.Module()))
# What vLLM binds to an attention or a state-space layer when it has the memory: not weights.
_CACHES = frozenset({"kv_cache"})
_SKIPPED = _MODULE_INTERNALS | _CACHES


class _Processors(dict[type, bool]):
    """Whether a type is one of vLLM's quantization methods, schemes or kernels.

    They keep state of the layer they processed (handlers, block sizes), and what
    they have in common is the method that processes it. Some layers have one too, but
    no layer is a method; vLLM's method of unquantized experts is an `nn.Module`, though.
    """

    def __missing__(self, kind: type) -> bool:
        self[kind] = known = hasattr(kind, "process_weights_after_loading") and (
            issubclass(kind, QuantizeMethodBase) or not issubclass(kind, nn.Module)
        )
        return known


class _Holders(dict[type, bool]):
    """Whether the walk has to look into values of a type; most attributes are plain."""

    def __missing__(self, kind: type) -> bool:
        containers = (Tensor, CPUDNNLGEMMHandler, FunctionType, list, tuple)
        self[kind] = known = issubclass(kind, containers) or _PROCESSORS[kind]
        return known


# Looked into tens of thousands of times a reload, for a few dozen types.
_PROCESSORS = _Processors()
_HOLDERS = _Holders()


def is_processor(value: object) -> bool:
    """Whether this is one of vLLM's quantization methods, schemes or kernels."""
    return _PROCESSORS[type(value)]


def is_handle(value: object) -> TypeGuard[Handle]:
    """Whether this is a oneDNN handler."""
    return isinstance(value, CPUDNNLGEMMHandler)


def leaves(module: nn.Module) -> dict[str, Leaf]:
    """Every tensor and handle of one module (not of its children), by path."""
    own = {**module._parameters, **module._buffers}
    found: dict[str, Leaf] = {name: value for name, value in own.items() if value is not None}
    for name, value in (*vars(module).items(), *module._modules.items()):
        if _HOLDERS[type(value)] and name not in _SKIPPED:
            _collect(name, value, found)
    return found


def tensors(module: nn.Module) -> Iterator[tuple[str, Tensor]]:
    """The leaves as tensors; a handle shows the tensor that holds its pointer."""
    for path, leaf in leaves(module).items():
        if isinstance(leaf, Tensor):
            yield path, leaf
        else:
            yield f"{path}.handler_tensor", leaf.handler_tensor


def _collect(path: str, value: object, found: dict[str, Leaf]) -> None:
    """Add the leaves behind a value to those found so far."""
    if isinstance(value, Tensor) or is_handle(value):
        found[path] = value
    elif _PROCESSORS[type(value)]:
        for name, inner in vars(value).items():
            if _HOLDERS[type(inner)]:
                _collect(f"{path}.{name}", inner, found)
    elif isinstance(value, FunctionType):
        cells = value.__closure__ or ()
        for name, cell in zip(value.__code__.co_freevars, cells, strict=True):
            _collect(f"{path}<{name}>", cell.cell_contents, found)
    elif isinstance(value, list | tuple):
        for index, inner in enumerate(value):
            if _HOLDERS[type(inner)]:
                _collect(f"{path}[{index}]", inner, found)


@dataclass
class Carry:
    """What a freshly processed layer holds, beside the live leaves that are to hold it.

    Attributes:
        copies: live tensor, fresh tensor.
        handles: live handler, fresh handler.

    """

    copies: list[tuple[Tensor, Tensor]] = field(default_factory=list)
    handles: list[tuple[Handle, Handle]] = field(default_factory=list)
    _noted: set[tuple[int, int]] = field(default_factory=set)

    @classmethod
    def of(cls, parts: Iterable[Carry]) -> Carry:
        """One carry of several, in which each tensor is copied once."""
        whole = cls()
        for part in parts:
            for live, fresh in part.copies:
                whole.copy(live, fresh)
            whole.handles.extend(part.handles)
        return whole

    def add(self, values: dict[str, Leaf], into: dict[str, Leaf], name: str) -> None:
        """Compare a freshly processed layer with the live one.

        Args:
            values: the leaves of the fresh layer.
            into: those of the live one.
            name: of the layer, for the error.

        Raises:
            ReloadError: the fresh one is laid out differently.

        """
        check_same_layout(values, into, name)
        for path, value in values.items():
            target = into[path]
            if isinstance(value, Tensor) and isinstance(target, Tensor):
                self.copy(target, value)
            elif is_handle(value) and is_handle(target):
                self.handles.append((target, value))

    def copy(self, live: Tensor, fresh: Tensor) -> None:
        """A live tensor is to hold what a fresh one does, unless that is the same memory.

        Modules that are tied hold one tensor, and are handed one: it is copied once.
        """
        addresses = (live.data_ptr(), fresh.data_ptr())
        if live.numel() and (addresses[0] == addresses[1] or addresses in self._noted):
            return
        self._noted.add(addresses)
        self.copies.append((live.detach(), fresh.detach()))

    def to_be(self, live: Tensor) -> Tensor:
        """What a live tensor is going to hold."""
        found = (fresh for into, fresh in self.copies if into.data_ptr() == live.data_ptr())
        return next(found, live)

    def remember(self, undo: UndoLog, *, soon: bool = True) -> None:
        """Let an undo log keep what is live."""
        for live, _ in self.copies:
            undo.remember(live, soon=soon)
        for pair in self.handles:
            how = functools.partial(_point, *pair, *_pointers(*pair))
            undo.remember_how(how, live=soon)

    def apply(self) -> int:
        """Make it live, in place: tensors keep their address; a handler keeps its object and its
        pointer tensor, and takes over the memory that the fresh one points to.

        Returns:
            Bytes written into live tensors.

        """
        for live, fresh in self.copies:
            _overwrite(live, fresh)
        for live_handle, fresh_handle in self.handles:
            exchange(live_handle, fresh_handle)
        return sum(live.nbytes for live, _ in self.copies)


def _overwrite(live: Tensor, fresh: Tensor) -> None:
    live.copy_(fresh)


def take_apart(twin: nn.Module) -> None:
    """Free what a twin holds, now.

    A kernel keeps bound methods of itself, so only the garbage collector would end
    it, and until then a whole model's old weights would stay in memory.
    """
    for value in (*vars(twin).values(), *twin._modules.values()):
        _empty(value)
    vars(twin).clear()


def _empty(processor: object) -> None:
    if not is_processor(processor):
        return
    inner = list(vars(processor).values())
    vars(processor).clear()
    for value in inner:
        _empty(value)


def check_same_layout(fresh: dict[str, Leaf], live: dict[str, Leaf], name: str) -> None:
    """Raise unless both layers hold the same leaves, laid out alike."""
    if fresh.keys() != live.keys():
        odd = sorted(fresh.keys() ^ live.keys())
        raise ReloadError(
            f"{name}: a freshly processed layer holds {sorted(fresh)}, the live one "
            f"{sorted(live)}; they differ in {odd}. flashquant cannot write this layer in place: "
            "unset FLASHRL_CONFIG, and report the layer."
        )
    for path, value in fresh.items():
        if _layout(value) != _layout(live[path]):
            raise ReloadError(
                f"{name}: {path} comes out of processing as {_layout(value)}, but the live one is "
                f"{_layout(live[path])}. It cannot be written in place."
            )


def exchange(one: Handle, other: Handle) -> None:
    """Swap the native objects of two handlers; neither Python object moves.

    Compiled code holds `handler_tensor` by address, so its value is what changes.
    """
    _point(other, one, *_pointers(one, other))


def _pointers(*handles: Handle) -> tuple[Tensor, ...]:
    """What the handlers point to at the moment."""
    return tuple(handle.handler_tensor.clone() for handle in handles)


def _point(one: Handle, other: Handle, first: Tensor, second: Tensor) -> None:
    """Let the handlers point to these two native objects, whatever they point to now."""
    one.handler_tensor.copy_(first)
    other.handler_tensor.copy_(second)


def _layout(leaf: Leaf) -> tuple[object, ...]:
    if not isinstance(leaf, Tensor):
        return ("oneDNN handler", leaf.k, leaf.n)
    stride = leaf.stride() if leaf.numel() else ()
    return (tuple(leaf.shape), stride, leaf.dtype, leaf.device.type)
