"""What modules make of their weights by themselves, once, and keep: it would go stale.

Found when nothing has been made yet: a part of a method that runs once (`run_once`), and reads a
parameter. It runs again after an update, and what it makes is copied to where the old values are:
captured graphs hold the address. A part that needs more than its module cannot be run again; an
engine with such a module is refused when it starts.

Limits
1. Those of `run_once`.
2. Only modules are looked at: the methods and kernels of layers are the probe's business.
"""

from __future__ import annotations

import functools
import inspect
from collections.abc import Callable
from dataclasses import dataclass
from types import FunctionType
from typing import Any

import torch
from torch import Tensor, nn

from flashquant.errors import ReloadError, UnsupportedEngine
from flashquant.patches.layers.run_once import Block, blocks, read_by
from flashquant.update import UndoLog

# Of a parameter, but not of its values.
_FORM = frozenset(
    {"device", "dim", "dtype", "element_size", "is_cuda", "is_meta", "ndim", "numel", "shape"}
    | {"size", "stride"}
)
_UNMADE = object()


@dataclass(frozen=True)
class MadeOnce:
    """Something that one module makes of its weights at its first pass, and keeps.

    Attributes:
        name: of the module in the model.
        module: it.
        attribute: of the module; holds nothing, or something old, before the first pass.
        in_place: whether the code writes into what the attribute holds already.
        again: runs the same code once more.

    """

    name: str
    module: nn.Module
    attribute: str
    in_place: bool
    again: Callable[[nn.Module], object]

    def make_anew(self, undo: UndoLog) -> None:
        """Bring what is kept up to date, where it is; nothing if nothing has been made yet.

        Raises:
            ReloadError: what is made now has another form.

        """
        old = self._held()
        if not isinstance(old, Tensor):
            return
        # A first pass runs in inference mode, and what it makes is written in no other.
        with torch.inference_mode():
            before = old.clone()
            undo.remember_how(functools.partial(self._put_back, old, before), nbytes=old.nbytes)
            if not self.in_place:
                self._hold(None)
            made = self.again(self.module)
        held = self._held()
        fresh = held if isinstance(held, Tensor) else made
        if not isinstance(fresh, Tensor) or _form(fresh) != _form(old):
            raise ReloadError(
                f"{self.name}.{self.attribute} ({type(self.module).__name__}) is made of weights, "
                "and has another form when it is made anew. Unset FLASHRL_CONFIG to serve this "
                "model unpatched, and please report it."
            )
        self._put_back(old, fresh)

    def _put_back(self, old: Tensor, values: Tensor) -> None:
        self._hold(old)
        if values is not old:
            with torch.inference_mode():
                old.copy_(values)

    def _held(self) -> object:
        return self._place.get(self.attribute)

    def _hold(self, value: Tensor | None) -> None:
        self._place[self.attribute] = value

    @property
    def _place(self) -> dict[str, Any]:
        buffers = self.module._buffers
        return buffers if self.attribute in buffers else vars(self.module)


def all_made_once(model: nn.Module) -> list[MadeOnce]:
    """Everything of this kind in a model that has made none of it yet.

    Raises:
        UnsupportedEngine: some of it could not be made anew after an update.

    """
    found = []
    for name, module in model.named_modules():
        for block in blocks(type(module)):  # type: ignore[arg-type]  # types are hashable
            sets = [attribute for attribute in block.sets if _may_hold(module, attribute)]
            if sets and _reads_parameter(module, block, frozenset()):
                found += [_made_by(name, module, block, attribute) for attribute in sets]
        if hasattr(module, "populate_sink_kv"):
            raise UnsupportedEngine(
                f"{name} ({type(module).__name__}) writes keys and values that are weights into "
                "the KV cache, once, where they would go stale when new ones are pushed. Unset "
                "FLASHRL_CONFIG to serve this model unpatched."
            )
    return found


def _may_hold(module: nn.Module, attribute: str) -> bool:
    """Whether an attribute may be where a tensor is kept: it holds nothing yet, or one."""
    if attribute in module._parameters or attribute in module._modules:
        return False
    held = vars(module).get(attribute, module._buffers.get(attribute))
    return held is None or isinstance(held, Tensor)


def _made_by(name: str, module: nn.Module, block: Block, attribute: str) -> MadeOnce:
    again = block.again()
    if again is None:
        raise UnsupportedEngine(
            f"{name} ({type(module).__name__}) makes {attribute!r} of its weights at its first "
            f"pass ({block.method.__qualname__}), out of more than it holds itself, and keeps it: "
            "it would go stale when new weights are pushed. Unset FLASHRL_CONFIG to serve this "
            "model unpatched, and please report it."
        )
    return MadeOnce(name, module, attribute, block.sets[attribute], again)


def _reads_parameter(module: nn.Module, block: Block, seen: frozenset[str]) -> bool:
    """Whether a block reads a parameter of its module, or of one inside it, or has one computed."""
    if any(_is_of_weights(module, path) for path in block.reads):
        return True
    for name in block.calls - seen:
        method = inspect.getattr_static(type(module), name, None)
        inner = read_by(method) if isinstance(method, FunctionType) else None
        if inner is not None and _reads_parameter(module, inner, seen | {name}):
            return True
    return False


def _is_of_weights(module: nn.Module, path: str) -> bool:
    value: Any = module
    for step in path.split("."):
        if step == "()":
            return isinstance(value, nn.Module) and any(True for _ in value.parameters())
        if isinstance(value, nn.Parameter):
            return step not in _FORM
        if not isinstance(value, nn.Module):
            return False
        held = {**vars(value), **value._modules, **value._parameters}
        value = held.get(step, _UNMADE)
    return isinstance(value, nn.Parameter)


def _form(tensor: Tensor) -> tuple[object, ...]:
    return tensor.shape, tensor.dtype, tensor.device
