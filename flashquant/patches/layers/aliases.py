"""Tensors of one layer that are windows of another layer's parameter.

Mamba's mixer takes a view of its convolution's weight when it is made. Where processing
then packs that weight into memory of its own, the view keeps what was loaded, and
the kernels may go on reading it: it is written by itself when the parameter goes live.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import NamedTuple

from torch import Tensor, nn

from flashquant.patches.layers import kernel_state
from flashquant.plan import View, storage_of


class Alias(NamedTuple):
    """A tensor of one layer, and which window of another layer's parameter it is."""

    tensor: Tensor
    target: str
    view: View


def aliases(model: nn.Module, names: Mapping[int, str]) -> Iterator[Alias]:
    """All aliases in a model that has just been created.

    Args:
        model: before its first weight.
        names: of its parameters in the engine, by id.

    """
    homes = {
        storage_of(parameter): names[id(parameter)]
        for parameter in model.parameters()
        if id(parameter) in names and not parameter.is_meta
    }
    for module in model.modules():
        for leaf in kernel_state.leaves(module).values():
            if isinstance(leaf, Tensor) and id(leaf) not in names:
                target = homes.get(storage_of(leaf))
                if target is not None:
                    yield Alias(leaf, target, View.of(leaf))
