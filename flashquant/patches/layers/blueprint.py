"""A layer as it was the moment the model was created.

Processing a layer (packing, transposing, quantizing) destroys what its loader
needs: shapes, dtypes, loaders, pristine kernel objects. So all of it is noted
before the first weight arrives: parameters on meta, attributes by reference,
vLLM's processors as copies. From a blueprint a twin can be built: the layer
in checkpoint format, ready for vLLM's own processing.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator, Mapping
from contextlib import AbstractContextManager
from dataclasses import dataclass, field
from types import MappingProxyType
from typing import Any

from torch import Tensor, nn
from vllm.model_executor.layers.quantization.base_config import QuantizeMethodBase
from vllm.model_executor.model_loader.reload.layerwise import _get_original_loader
from vllm.model_executor.model_loader.reload.meta import to_meta_tensor

from flashquant.patches.layers import kernel_state
from flashquant.patches.layers.kernel_state import is_processor

Context = Callable[[], AbstractContextManager[object]]  # in which vLLM processes layers


@dataclass(frozen=True)
class LayerBlueprint:
    """One module before its first weight: enough to load it, and to build it again."""

    name: str
    module: nn.Module
    attributes: Mapping[str, Any]
    parameters: Mapping[str, Tensor | None]  # on meta; None as registered
    targets: Mapping[str, str]  # parameter -> its name in the model; shared ones share it
    # Of a deferred attention: parameters of other layers that it makes its own weights from.
    sources: Mapping[int, str] = field(default_factory=dict)  # id -> target

    def build(
        self, values: Mapping[str, Tensor], instead: Mapping[int, object] = MappingProxyType({})
    ) -> nn.Module:
        """A module like the live one was before processing, holding `values`.

        Args:
            values: one tensor a parameter, in checkpoint format, used as it is.
            instead: what replaces modules and parameters of other layers, by id.

        """
        twin = object.__new__(type(self.module))
        twin.__dict__.update(
            _pristine(self.attributes, instead),
            _parameters={
                name: None if meta is None else dressed(values[name], meta)
                for name, meta in self.parameters.items()
            },
        )
        if self.sources:  # processing sets an attention's cache scales, which the live one keeps
            twin._buffers.update(
                (name, buffer.clone())
                for name, buffer in twin._buffers.items()
                if buffer is not None
            )
        return twin

    def loaded(self) -> Iterator[tuple[str, Tensor]]:
        """Each parameter that is loaded, and not processed yet, by target.

        Online schemes process a layer while it loads; what no longer is in
        checkpoint format is not among them.
        """
        for name, target in self.targets.items():
            live, meta = self.module._parameters.get(name), self.parameters[name]
            if live is None or meta is None or live.is_meta:
                continue
            if (live.shape, live.dtype) == (meta.shape, meta.dtype):
                yield target, live.detach()

    @property
    def forms(self) -> dict[str, Tensor]:
        """The form of each parameter that the module owns, on meta, by target."""
        forms = ((target, self.parameters[name]) for name, target in self.targets.items())
        return {target: form for target, form in forms if form is not None}

    @property
    def method(self) -> QuantizeMethodBase | None:
        """What vLLM processes this module's weights with, if anything."""
        method = getattr(self.module, "quant_method", None)
        return method if isinstance(method, QuantizeMethodBase) else None

    @property
    def shared(self) -> list[object]:
        """What another module may have in common with this one: targets, and live parameters."""
        live = (self.module._parameters.get(name) for name in self.targets)
        own = [*self.targets.values(), *self.sources.values()]
        return [*own, *(id(p) for p in live if p is not None)]


def module_blueprint(
    path: str, module: nn.Module, metas: Mapping[int, Tensor], names: Mapping[int, str]
) -> LayerBlueprint:
    """The blueprint of a module, which is as it was created.

    Args:
        path: its name in the model.
        module: which owns parameters.
        metas: the parameters of the model on meta, by id.
        names: of these parameters, by id.

    """
    attributes = {key: value for key, value in vars(module).items() if key != "_parameters"}
    return LayerBlueprint(
        name=path,
        module=module,
        attributes=_pristine(attributes),
        parameters={
            name: None if parameter is None else metas[id(parameter)]
            for name, parameter in module._parameters.items()
        },
        targets={
            name: names[id(parameter)]
            for name, parameter in module._parameters.items()
            if parameter is not None
        },
    )


def attention_blueprint(path: str, module: nn.Module, names: Mapping[int, str]) -> LayerBlueprint:
    """The blueprint of an attention that vLLM processes after all other modules.

    Its own parameters are KV-cache scales, and are left alone. It reads the parameters of its
    children, and those that its implementation was handed.
    """
    handed = (leaf for leaf in kernel_state.leaves(module).values() if id(leaf) in names)
    read = [parameter for child in module.children() for parameter in child.parameters()]
    return LayerBlueprint(
        name=path,
        module=module,
        attributes=_pristine({k: v for k, v in vars(module).items() if k != "_parameters"}),
        parameters={},
        targets={},
        sources={id(one): names[id(one)] for one in (*read, *handed) if id(one) in names},
    )


def on_meta(parameter: Tensor) -> Tensor:
    """A parameter without memory, with its class and with the loader that copies."""
    meta: Tensor = to_meta_tensor(parameter)
    if hasattr(meta, "weight_loader"):
        # An online scheme wraps loaders to process a layer when it is full; the
        # trace wants the loader that copies.
        meta.weight_loader = _get_original_loader(meta)
    return meta


def dressed(value: Tensor, meta: Tensor) -> Tensor:
    """`value` as a parameter of the class, and with the loader, that `meta` has."""
    parameter = value.detach()
    parameter.__class__ = meta.__class__
    parameter.__dict__ = dict(meta.__dict__)
    return parameter


def _pristine(
    attributes: Mapping[str, Any], instead: Mapping[int, object] = MappingProxyType({})
) -> dict[str, Any]:
    """The attributes of a layer, with a copy of whatever processing would change.

    `instead` says, by id, what is replaced by something else wherever it is met.
    """
    seen: dict[int, Any] = dict(instead)
    return {key: _copied(value, seen) for key, value in attributes.items()}


def _copied(value: Any, seen: dict[int, Any]) -> Any:
    """A processor and whatever is inside it, or a container, copied; the rest as it is.

    A dict may hold processors: one that is an `nn.Module` lies among a layer's submodules.
    """
    if id(value) in seen:
        return seen[id(value)]
    if isinstance(value, dict):
        copied = copy.copy(value)
        copied.update(
            (key, _copied(inner, seen))
            for key, inner in value.items()
            if is_processor(inner) or id(inner) in seen
        )
        return copied
    if isinstance(value, set):
        return copy.copy(value)
    if is_processor(value):
        seen[id(value)] = twin = copy.copy(value)
        vars(twin).update((name, _copied(inner, seen)) for name, inner in vars(value).items())
        return twin
    return value
