"""Buffers that a checkpoint may bring, as Gemma 4's `layer_scalar` or the sums of a BatchNorm.

vLLM's loaders copy into every persistent buffer whose name they meet, as into a parameter, and
process none of them. Which of them a checkpoint brings only its names can tell, so each is a layer
of its own that an update need not fill.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator

from torch import Tensor, nn

from flashquant.patches.layers.attention import is_deferred_attention_layer
from flashquant.patches.layers.blueprint import LayerBlueprint, on_meta
from flashquant.patches.layers.in_place import InPlaceLayer


class BufferLayer(InPlaceLayer):
    """One buffer, which its module reads where it lies."""

    def __init__(self, blueprint: LayerBlueprint, live: Tensor) -> None:
        (target,) = blueprint.targets.values()
        super().__init__(blueprint, {target: live})
        self.name = target

    def tensors(self) -> Iterator[tuple[str, Tensor]]:
        yield from self.homes.items()


def buffer_blueprints(model: nn.Module) -> Iterator[LayerBlueprint]:
    """A blueprint of each buffer that a loader would fill, in a model that has just been created.

    Those of an attention are scales of the KV cache: they belong to the cache, and survive.
    """
    for path, module in model.named_modules():
        if is_deferred_attention_layer(module):
            continue
        for name, buffer in module._buffers.items():
            if buffer is not None and name not in module._non_persistent_buffers_set:
                target = f"{path}.{name}" if path else name
                yield LayerBlueprint(path, module, {}, {name: on_meta(buffer)}, {name: target})


def buffer_layers(blueprints: Iterable[LayerBlueprint]) -> Iterator[BufferLayer]:
    """The live layers of those buffers that still are as their loader filled them."""
    for blueprint in blueprints:
        ((name, meta),) = blueprint.parameters.items()
        live = blueprint.module._buffers.get(name)
        if live is None or meta is None or live.is_meta or not live.is_contiguous():
            continue
        if (live.shape, live.dtype) == (meta.shape, meta.dtype):
            yield BufferLayer(blueprint, live.detach())
