"""What loaders make of the weights that they have just loaded, and leave in plain attributes.

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
    """The floats that modules hold beside parameters and buffers, by module and attribute.

    Not those of layers that vLLM processes, nor of attentions.
    """
    found: dict[tuple[str, str], Tensor] = {}
    for name, module in model.named_modules():
        if hasattr(module, "quant_method") or is_deferred_attention_layer(module):
            continue
        for attribute, value in vars(module).items():
            each = value if isinstance(value, list | tuple) else (value,)
            for index, tensor in enumerate(each):
                if isinstance(tensor, Tensor) and tensor.is_floating_point():
                    found[name, f"{attribute}[{index}]" if each is value else attribute] = tensor
    return found


def while_loaded(model: nn.Module, before: dict[tuple[str, str], Tensor]) -> list[str]:
    """What a loader has made of the weights and left in plain attributes, by name.

    Args:
        model: its checkpoint has just been loaded.
        before: its `plain_tensors` when it had just been created.

    """
    known = {storage_of(t) for t in (*model.parameters(), *model.buffers(), *before.values())}
    return [
        f"{name}.{attribute}" if name else attribute
        for (name, attribute), tensor in plain_tensors(model).items()
        if storage_of(tensor) not in known
    ]


@contextmanager
def attributes_kept(model: nn.Module) -> Iterator[None]:
    """While a loader is watched on meta tensors: whatever it sets on modules is taken back."""
    kept = [(module, dict(vars(module))) for module in model.modules()]
    try:
        yield
    finally:
        for module, attributes in kept:
            for attribute, value in attributes.items():
                if isinstance(value, Tensor | list | tuple):
                    object.__setattr__(module, attribute, value)
