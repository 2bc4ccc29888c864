"""One module that vLLM would process, with a method that does to it whatever a test wants."""

from __future__ import annotations

import contextlib
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from vllm.model_executor.layers.quantization.base_config import QuantizeMethodBase

from flashquant.patches.layers import LayerBlueprint
from flashquant.patches.layers.blueprint import module_blueprint, on_meta
from flashquant.patches.layers.probe import Probe

CPU = torch.device("cpu")
Process = Callable[[Any], None]


class Method(QuantizeMethodBase):
    """Stands for one of vLLM's quantization methods."""

    def __init__(self, process: Process) -> None:
        self.process = process
        self.processed = 0

    def create_weights(self, layer: nn.Module, *args: Any, **kwargs: Any) -> None:
        raise NotImplementedError

    def apply(self, layer: nn.Module, *args: Any, **kwargs: Any) -> Tensor:
        raise NotImplementedError

    def process_weights_after_loading(self, layer: nn.Module) -> None:
        self.process(layer)


def parameter(tensor: Tensor) -> nn.Parameter:
    return nn.Parameter(tensor, requires_grad=False)


def pack(layer: Any) -> None:
    """Another order of the weight's bytes; the rest is left as it is."""
    layer.weight = parameter(layer.weight.t().contiguous())


def created(process: Process | None, name: str = "layer", **own: Tensor) -> LayerBlueprint:
    """The blueprint of a module that holds these parameters and is not processed yet.

    Args:
        process: what its method does; None for a module without one.
        name: of the module.
        own: its parameters, as they were loaded.

    """
    module = nn.Module()
    for key, tensor in own.items():
        module.register_parameter(key, parameter(tensor))
    if process is not None:
        vars(module)["quant_method"] = Method(process)
    metas = {id(one): on_meta(one) for one in module.parameters()}
    names = {id(one): f"{name}.{key}" for key, one in module.named_parameters()}
    return module_blueprint(name, module, metas, names)


def process(blueprint: LayerBlueprint) -> LayerBlueprint:
    """Process the live module, as vLLM does when it is loaded."""
    live: Any = blueprint.module
    if blueprint.method is not None:
        live.quant_method.process_weights_after_loading(live)
    return blueprint


def probe() -> Probe:
    return Probe(contextlib.nullcontext, CPU)
