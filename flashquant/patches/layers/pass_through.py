"""Which parameters vLLM's processing only hands on, found by watching it.

A bias is passed to the matmul as it is, or widened to float32; nothing else is
made from it. Such a parameter can go live by itself, whatever becomes of the
weight next to it. A weight is packed or quantized; its scales may be read through
a pointer that a handler keeps. Those belong together.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode

from flashquant.patches.layers import kernel_state
from flashquant.plan import storage_of, tensors_in

# What may be done to a parameter without making anything new of it.
_HANDED_ON = {
    torch.ops.aten.detach.default,
    torch.ops.aten.alias.default,
    torch.ops.aten._to_copy.default,
}


def handed_on(twin: nn.Module, own: Mapping[str, Tensor]) -> dict[str, tuple[str, ...]]:
    """Process `twin` and say which of its parameters come out as plain copies.

    Args:
        twin: a layer in checkpoint format; it is processed, and taken apart, by this call.
        own: its parameters by name.

    Returns:
        For each parameter that was only handed on, the paths of the leaves that
        are it, in whatever dtype.

    """
    watcher = _Watcher(own)
    with watcher:
        method: Any = twin.quant_method
        method.process_weights_after_loading(twin)
    homes: dict[str, list[str]] = {name: [] for name in own if name not in watcher.used}
    for path, leaf in kernel_state.leaves(twin).items():
        name = watcher.origins.get(storage_of(leaf)) if isinstance(leaf, Tensor) else None
        if name in homes:
            homes[name].append(path)
    kernel_state.take_apart(twin)
    return {name: tuple(paths) for name, paths in homes.items() if paths}


class _Watcher(TorchDispatchMode):  # type: ignore[no-untyped-call]  # torch leaves it untyped
    """Follows parameters through copies, and notes those that anything else was done to."""

    def __init__(self, own: Mapping[str, Tensor]) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.used: set[str] = set()
        self.origins = {storage_of(tensor): name for name, tensor in own.items()}
        self._alive: list[Tensor] = list(own.values())  # an address must not be used again

    def __torch_dispatch__(
        self,
        func: Any,
        types: Any,
        args: tuple[Any, ...] = (),
        kwargs: dict[str, Any] | None = None,
    ) -> Any:
        result = func(*args, **(kwargs or {}))
        found = (self.origins.get(storage_of(tensor)) for tensor in tensors_in((args, kwargs)))
        read = {name for name in found if name is not None}
        if func not in _HANDED_ON:
            self.used |= read
        elif len(read) == 1:
            (name,) = read
            for tensor in tensors_in(result):
                self._alive.append(tensor)
                self.origins[storage_of(tensor)] = name
        return result
