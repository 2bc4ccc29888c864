"""Buffers that a checkpoint may bring, as Gemma 4's `layer_scalar`."""

from __future__ import annotations

import torch
from torch import nn

from flashquant.patches.layers import ModelBlueprint, buffer_layers


class Scaled(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("scalar", torch.ones(1))
        self.register_buffer("cache", torch.ones(1), persistent=False)
        self.norm = nn.LayerNorm(2)


def test_a_loader_meets_persistent_buffers_on_meta_and_nothing_else_of_them():
    model = Scaled()
    live, cache, blueprint = model.scalar, model.cache, ModelBlueprint(model)

    with blueprint.laid_out():
        assert model.scalar.is_meta
        assert model.cache is cache

    assert model.scalar is live
    assert blueprint.targets.keys() == {"scalar", "norm.weight", "norm.bias"}


def test_what_arrives_of_one_is_written_where_its_module_reads_it():
    model = Scaled()
    (layer,) = buffer_layers(ModelBlueprint(model).buffers)

    assert layer.name == "scalar"
    assert layer.homes["scalar"].data_ptr() == model.scalar.data_ptr()
