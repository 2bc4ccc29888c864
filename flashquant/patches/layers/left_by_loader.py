"""What loaders make of the weights that they have just loaded, and leave in plain attributes or
buffers.

It is in no parameter, so no push would reach it. It shows as tensors that are there after the
load of the checkpoint, and were not when the model was created.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

from torch import Tensor, nn

from flashquant.patches.layers.attention import is_deferred_attention_layer
from flashquant.plan import storage_of


def plain_tensors(model: nn.Module) -> dict[tuple[str, str], Tensor]:
    """The floats that modules hold beside parameters, by module and attribute.

    Not those of layers that vLLM processes, nor of attentions.
    """
    found: dict[tuple[str, str], Tensor] = {}
    for name, module in model.named_modules():
        if hasattr(module, "quant_method") or is_deferred_attention_layer(module):
            continue
        for attribute, value in (*vars(module).items(), *module._buffers.items()):
            each = value if isinstance(value, list | tuple) else (value,)
            for index, tensor in enumerate(each):
                if isinstance(tensor, Tensor) and tensor.is_floating_point():
                    found[name, f"{attribute}[{index}]" if each is value else attribute] = tensor
    return found


def while_loaded(model: nn.Module, before: dict[tuple[str, str], Tensor]) -> list[str]:
    """What a loader has made of the weights and left beside them, by name.

    Args:
        model: its checkpoint has just been loaded.
        before: its `plain_tensors` when it had just been created.

    """
    after = plain_tensors(model)
    brought = (t for place, t in after.items() if place in before and _is_buffer(model, *place))
    known = {storage_of(t) for t in (*model.parameters(), *before.values(), *brought)}
    return [
        f"{name}.{attribute}" if name else attribute
        for (name, attribute), tensor in after.items()
        if storage_of(tensor) not in known
    ]


def _is_buffer(model: nn.Module, name: str, attribute: str) -> bool:
    """Whether it may be a checkpoint's, which has been loaded in the place of another."""
    return attribute in model.get_submodule(name)._buffers


@contextmanager
def attributes_kept(model: nn.Module) -> Iterator[None]:
    """While a loader is watched on meta tensors: whatever it sets on modules is taken back."""
    kept = [(module, dict(vars(module)), dict(module._buffers)) for module in model.modules()]
    try:
        yield
    finally:
        for module, attributes, buffers in kept:
            module._buffers.update(buffers)
            for attribute, value in attributes.items():
                if isinstance(value, Tensor | list | tuple):
                    object.__setattr__(module, attribute, value)
