"""The blueprints of a whole model, and the way to load onto them.

A blueprint can be put under the model's loader without touching a live tensor: only the
dictionaries that hold parameters are exchanged while the loader runs.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import replace

import torch
from torch import Tensor, nn
from vllm.model_executor.layers.vocab_parallel_embedding import VocabParallelEmbedding

from flashquant.patches.layers.aliases import Alias, aliases
from flashquant.patches.layers.attention import is_deferred_attention_layer
from flashquant.patches.layers.blueprint import (
    LayerBlueprint,
    attention_blueprint,
    dressed,
    module_blueprint,
    on_meta,
)
from flashquant.patches.layers.buffers import buffer_blueprints
from flashquant.plan import storage_of


class ModelBlueprint:
    """The blueprints of all layers that own parameters.

    Attributes:
        layers: one blueprint a module, in the model's order.
        buffers: one blueprint a buffer that a checkpoint may bring.
        targets: parameters and these buffers on meta, by name.
        tied: the other names of parameters that several modules hold, and the name of each.

    """

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
                    metas[id(parameter)] = on_meta(parameter)
                    names[id(parameter)] = f"{path}.{name}" if path else name
            if any(parameter is not None for parameter in module._parameters.values()):
                self.layers.append(module_blueprint(path, module, metas, names))
        self._deferred = [
            attention_blueprint(path, module, names)
            for path, module in model.named_modules()
            if is_deferred_attention_layer(module)
        ]
        # A checkpoint may hold their own parameters: loaders that are watched find them on meta.
        self._of_caches = [
            (module, {name: on_meta(p) for name, p in module._parameters.items() if p is not None})
            for module in model.modules()
            if is_deferred_attention_layer(module) and module._parameters
        ]
        self._aliases = tuple(aliases(model, names))
        self._model = model
        self._places = [
            (parent, name, child)
            for parent in model.modules()
            for name, child in parent.named_children()
        ]
        self.targets: dict[str, Tensor] = {names[key]: meta for key, meta in metas.items()}
        self.buffers = tuple(buffer_blueprints(model))
        self.targets |= {target: meta for one in self.buffers for target, meta in one.forms.items()}
        self.tied = dict(_other_names(model, self.layers, names))
        # Parameters are told apart by id; keeping them alive keeps the ids theirs.
        self._originals = list(model.parameters())

    def release_originals(self) -> None:
        """Let parameters be freed that processing has replaced: their ids are needed no more."""
        self._originals.clear()

    def groups(self) -> list[list[LayerBlueprint]]:
        """The blueprints, those that share a parameter (at creation or now) together."""
        groups: list[list[LayerBlueprint]] = []
        homes: dict[object, list[LayerBlueprint]] = {}
        for layer in (*self.layers, *(layer for layer in self._deferred if layer.sources)):
            home = next((homes[key] for key in layer.shared if key in homes), None)
            if home is None:
                groups.append(home := [])
            home.append(layer)
            homes.update(dict.fromkeys(layer.shared, home))
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
        """Treat as one parameter those that vLLM has tied since the model was created.

        vLLM ties a head once it has loaded one that equals the embeddings.
        """
        firsts: dict[int, tuple[str, Tensor]] = {}
        for position, layer in enumerate(self.layers):
            parameters, targets = dict(layer.parameters), dict(layer.targets)
            for name, target in layer.targets.items():
                live, meta = layer.module._parameters.get(name), parameters[name]
                if live is None or meta is None or live.shape != meta.shape:
                    continue  # processed away; what is left in its place may be anything
                first, its_meta = firsts.setdefault(id(live), (target, meta))
                if first != target and meta.dtype == its_meta.dtype:
                    parameters[name], targets[name] = its_meta, first
                    self.tied[target] = first
                    self.targets.pop(target, None)
            self.layers[position] = replace(layer, parameters=parameters, targets=targets)

    def stale_aliases(self) -> list[Alias]:
        """The aliases that processing has left behind: their parameter is elsewhere now."""
        homes = {
            target: storage_of(live)
            for layer in self.layers
            for name, target in layer.targets.items()
            if (live := layer.module._parameters.get(name)) is not None
        }
        return [one for one in self._aliases if storage_of(one.tensor) != homes.get(one.target)]

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
        """Like `laid_out`, on meta, with a parameter of its own under each name of a tied one.

        So a loader that leaves such a name out shows where it would put what comes under it.
        """
        targets: dict[str, Tensor] = {}

        def own(layer: LayerBlueprint, name: str, meta: Tensor) -> Tensor:
            path = f"{layer.name}.{name}" if layer.name else name
            first = layer.targets[name] not in targets
            target = layer.targets[name] if first else path
            alone = meta if first else dressed(torch.empty_like(meta), meta)
            return targets.setdefault(target, alone)

        with self._exchanged(own):
            yield targets

    @contextmanager
    def _exchanged(
        self, parameter: Callable[[LayerBlueprint, str, Tensor], Tensor]
    ) -> Iterator[None]:
        """Put other parameters under the model, each made of its layer, name and form."""
        modules = [*(layer.module for layer in self.layers), *(m for m, _ in self._of_caches)]
        kept = [(module, module._parameters) for module in modules]
        held = [(one.module, dict(one.module._buffers)) for one in self.buffers]
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
            for one in self.buffers:
                one.module._buffers.update(
                    (name, parameter(one, name, meta))
                    for name, meta in one.parameters.items()
                    if meta is not None
                )
            for module, scales in self._of_caches:
                module.__dict__["_parameters"] = {**module._parameters, **scales}
            yield
        finally:
            for module, parameters in kept:
                module.__dict__["_parameters"] = parameters
            for module, buffers in held:
                module._buffers.update(buffers)
            for parent, live in children:
                parent._modules.clear()
                parent._modules.update(live)

    def _dropped_children(self) -> list[tuple[nn.Module, str, nn.Module]]:
        """The children that others have replaced since, as a draft's head by its target's.

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
    """Other names of parameters that two modules hold, or of embeddings that are held twice."""
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


def _stand_in(target: str, meta: Tensor, values: Mapping[str, Tensor]) -> Tensor:
    return dressed(values[target], meta) if target in values else meta
