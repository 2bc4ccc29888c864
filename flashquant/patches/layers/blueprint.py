"""The layers as they were the moment the model was created.

Processing a layer (packing, transposing, quantizing) destroys what its loader
needs: shapes, dtypes, loaders, pristine kernel objects. So all of it is noted
before the first weight arrives: parameters on meta, attributes by reference,
vLLM's processors as copies. A blueprint can be put under the model's loader
without touching a live tensor, and it can be built: a twin of one layer, in
checkpoint format, ready for vLLM's own processing.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from types import MappingProxyType
from typing import Any

import torch
from torch import Tensor, nn
from vllm.model_executor.layers.vocab_parallel_embedding import VocabParallelEmbedding
from vllm.model_executor.model_loader.reload.layerwise import _get_original_loader
from vllm.model_executor.model_loader.reload.meta import to_meta_tensor

from flashquant.patches.layers import kernel_state
from flashquant.patches.layers.aliases import Borrowed, borrowed
from flashquant.patches.layers.attention import is_deferred_attention_layer
from flashquant.patches.layers.kernel_state import is_processor
from flashquant.plan import storage_of


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
            instead: what stands in for modules and parameters of other layers, by id.

        """
        twin = object.__new__(type(self.module))
        twin.__dict__.update(
            _pristine(self.attributes, instead),
            _parameters={
                name: None if meta is None else _dressed(values[name], meta)
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
    def _shared(self) -> list[object]:
        """What another module may have in common with this one: targets, and live parameters."""
        live = (self.module._parameters.get(name) for name in self.targets)
        mine = [*self.targets.values(), *self.sources.values()]
        return [*mine, *(id(p) for p in live if p is not None)]


class ModelBlueprint:
    """The blueprints of all layers that own parameters, and the way to load onto them."""

    def __init__(self, model: nn.Module) -> None:
        metas: dict[int, Tensor] = {}
        names: dict[int, str] = {}
        self.layers: list[LayerBlueprint] = []
        for path, module in model.named_modules():
            if is_deferred_attention_layer(module):
                # Its parameters are KV-cache scales: they belong to the cache, and survive.
                continue
            for name, parameter in module._parameters.items():
                if parameter is not None and id(parameter) not in metas:
                    metas[id(parameter)] = _on_meta(parameter)
                    names[id(parameter)] = f"{path}.{name}" if path else name
            if any(parameter is not None for parameter in module._parameters.values()):
                self.layers.append(_blueprint(path, module, metas, names))
        self._deferred = [
            _deferred(path, module, names)
            for path, module in model.named_modules()
            if is_deferred_attention_layer(module)
        ]
        self._borrowed = tuple(borrowed(model, names))
        self._model = model
        self._places = [
            (parent, name, child)
            for parent in model.modules()
            for name, child in parent.named_children()
        ]
        self.targets: dict[str, Tensor] = {names[key]: meta for key, meta in metas.items()}
        # The other names of a parameter that several modules hold, and its first one.
        self.tied = dict(_other_names(model, self.layers, names))
        # Parameters are told apart by id; keeping them alive keeps the ids theirs.
        self._originals = list(model.parameters())

    def release_originals(self) -> None:
        """The ids are no longer needed: let processed-away parameters be freed."""
        self._originals.clear()

    def groups(self) -> list[list[LayerBlueprint]]:
        """The blueprints, those that share a parameter (at creation or now) together."""
        groups: list[list[LayerBlueprint]] = []
        homes: dict[object, list[LayerBlueprint]] = {}
        for layer in (*self.layers, *(layer for layer in self._deferred if layer.sources)):
            home = next((homes[key] for key in layer._shared if key in homes), None)
            if home is None:
                groups.append(home := [])
            home.append(layer)
            homes.update(dict.fromkeys(layer._shared, home))
        return groups

    def keep(self, layers: Sequence[LayerBlueprint]) -> None:
        """Forget all modules but these, for a look at one of each kind."""
        kept = {id(layer.module) for layer in layers}
        self.layers = [layer for layer in self.layers if id(layer.module) in kept]
        self._deferred = [layer for layer in self._deferred if id(layer.module) in kept]

    def shared(self) -> Iterator[Tensor]:
        """The live parameters that more than one module holds."""
        seen: set[int] = set()
        for layer in self.layers:
            for parameter in layer.module._parameters.values():
                if id(parameter) in seen and parameter is not None:
                    yield parameter
                seen.add(id(parameter))

    def tie(self) -> None:
        """What has become one parameter since the model was created, is one from now on.

        vLLM ties a head once it has loaded one that equals the embeddings.
        """
        firsts: dict[int, tuple[str, Tensor]] = {}
        for position, layer in enumerate(self.layers):
            parameters, targets = dict(layer.parameters), dict(layer.targets)
            for name, target in layer.targets.items():
                live, meta = layer.module._parameters.get(name), parameters[name]
                if live is None or meta is None or live.shape != meta.shape:
                    continue  # processed away; what is left in its place may be anybody's
                first, its_meta = firsts.setdefault(id(live), (target, meta))
                if first != target and meta.dtype == its_meta.dtype:
                    parameters[name], targets[name] = its_meta, first
                    self.tied[target] = first
                    self.targets.pop(target, None)
            self.layers[position] = replace(layer, parameters=parameters, targets=targets)

    def stale(self) -> list[Borrowed]:
        """The windows that processing has left behind: the parameter is elsewhere now."""
        homes = {
            target: storage_of(live)
            for layer in self.layers
            for name, target in layer.targets.items()
            if (live := layer.module._parameters.get(name)) is not None
        }
        return [one for one in self._borrowed if storage_of(one.tensor) != homes.get(one.target)]

    @contextmanager
    def laid_out(self, values: Mapping[str, Tensor] | None = None) -> Iterator[None]:
        """Put the checkpoint-format parameters under the model while a loader runs.

        Only the dictionaries that hold parameters are exchanged, and put back as
        they were; no live tensor is in reach of the loader meanwhile. `values`
        (target name to real tensor) stand in for meta parameters.
        """
        values = values or {}
        with self._exchanged(
            lambda layer, name, meta: _stand_in(layer.targets[name], meta, values)
        ):
            yield

    @contextmanager
    def apart(self) -> Iterator[Mapping[str, Tensor]]:
        """The same on meta, with a parameter of its own under each name of one that is tied.

        So a loader that leaves such a name out shows where it would put what comes under it.
        """
        targets: dict[str, Tensor] = {}

        def own(layer: LayerBlueprint, name: str, meta: Tensor) -> Tensor:
            path = f"{layer.name}.{name}" if layer.name else name
            first = layer.targets[name] not in targets
            target = layer.targets[name] if first else path
            alone = meta if first else _dressed(torch.empty_like(meta), meta)
            return targets.setdefault(target, alone)

        with self._exchanged(own):
            yield targets

    @contextmanager
    def _exchanged(
        self, parameter: Callable[[LayerBlueprint, str, Tensor], Tensor]
    ) -> Iterator[None]:
        """Other parameters under the model, by layer, name and checkpoint form."""
        kept = [(layer.module, layer.module._parameters) for layer in self.layers]
        exchanged = self._dropped_children()
        children = [(parent, dict(parent._modules)) for parent, _, _ in exchanged]
        try:
            for parent, name, child in exchanged:
                parent._modules[name] = child
            for layer in self.layers:
                layer.module.__dict__["_parameters"] = {
                    name: None if meta is None else parameter(layer, name, meta)
                    for name, meta in layer.parameters.items()
                }
            yield
        finally:
            for module, parameters in kept:
                module.__dict__["_parameters"] = parameters
            for parent, live in children:
                parent._modules.clear()
                parent._modules.update(live)

    def _dropped_children(self) -> list[tuple[nn.Module, str, nn.Module]]:
        """The children that were dropped for others since, as a draft's head for its target's.

        A wrapper, such as an adapter's, still holds what was there.
        """
        live = set(self._model.modules())
        return [
            (parent, name, child)
            for parent, name, child in self._places
            if child not in live and parent in live
        ]


def _other_names(
    model: nn.Module, layers: Sequence[LayerBlueprint], names: Mapping[int, str]
) -> Iterator[tuple[str, str]]:
    """Those of parameters that two modules hold, or of embeddings that the model holds twice."""
    for layer in layers:
        for name, target in layer.targets.items():
            path = f"{layer.name}.{name}" if layer.name else name
            if path != target:
                yield path, target
    for prefix, module in model.named_modules(remove_duplicate=False):
        if isinstance(module, VocabParallelEmbedding):
            for name, parameter in module.named_parameters(prefix, recurse=False):
                if names.get(id(parameter), name) != name:
                    yield name, names[id(parameter)]


def _blueprint(
    path: str, module: nn.Module, metas: Mapping[int, Tensor], names: Mapping[int, str]
) -> LayerBlueprint:
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


def _deferred(path: str, module: nn.Module, names: Mapping[int, str]) -> LayerBlueprint:
    """An attention: its own parameters are KV-cache scales, and are left alone.

    It reads the parameters of its children, and those that its implementation was handed.
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


def _on_meta(parameter: Tensor) -> Tensor:
    meta: Tensor = to_meta_tensor(parameter)
    if hasattr(meta, "weight_loader"):
        # An online scheme wraps loaders to process a layer when it is full; the
        # trace wants the loader that copies.
        meta.weight_loader = _get_original_loader(meta)
    return meta


def _stand_in(target: str, meta: Tensor, values: Mapping[str, Tensor]) -> Tensor:
    return _dressed(values[target], meta) if target in values else meta


def _dressed(value: Tensor, meta: Tensor) -> Tensor:
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
