"""nvfp4: a bf16 checkpoint into layers of NVFP4, which vLLM has for packed checkpoints only.

A layer of compressed-tensors' nvfp4-pack-quantized form has one divisor for all of its scales, of a
fused layer, too, so no shard can be quantized before the others are there. The layer is loaded in
floats, as vLLM loads those that it quantizes itself (`initialize_online_processing`: one at a
time), and its codes are made right before vLLM's own processing: what that gets is what a packed
checkpoint, whose shards share a divisor, would have brought.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import Parameter
from vllm.config import get_current_vllm_config_or_none
from vllm.model_executor.layers.quantization.online import fp8 as online
from vllm.model_executor.model_loader.reload.layerwise import initialize_online_processing
from vllm.model_executor.parameter import ModelWeightParameter

from flashquant.patches.decided import schemes_of
from flashquant.patches.point import PatchPoint
from flashquant.schemes import NVFP4_GROUP, largest, nvfp4_matrix

_FLOATS = "weight"
_CODES = ("weight_packed", "weight_scale", "weight_global_scale")


def _create_weights(original: Any, form: Any, layer: nn.Module, *args: Any, **kwargs: Any) -> None:
    if "nvfp4" not in schemes_of(get_current_vllm_config_or_none()):
        original(form, layer, *args, **kwargs)
        return
    width: int = kwargs["input_size_per_partition"]
    if width % NVFP4_GROUP:
        raise ValueError(f"its {width} input channels are no multiple of groups of {NVFP4_GROUP}")
    original(form, layer, *args, **kwargs)
    rows = len(layer.get_parameter(_CODES[0]))
    for name in _CODES:
        delattr(layer, name)
    floats = ModelWeightParameter(
        data=torch.empty(rows, width, dtype=kwargs["params_dtype"], device="meta"),
        input_dim=1,
        output_dim=0,
        weight_loader=kwargs["weight_loader"],
    )
    layer.register_parameter(_FLOATS, floats)
    method: Any = layer.quant_method
    method.uses_meta_device = True  # vLLM asks whether it has layers left to process
    initialize_online_processing(layer)


def _process_weights(original: Any, form: Any, layer: nn.Module) -> None:
    floats = layer._parameters.get(_FLOATS)
    if floats is None:
        original(form, layer)  # of a packed checkpoint
    elif floats.is_floating_point():  # not again: vLLM comes to layers that it has processed, too
        delattr(layer, _FLOATS)
        for name, made in zip(_CODES, nvfp4_matrix(floats.data, _peak(layer, floats)), strict=True):
            layer.register_parameter(name, Parameter(made, requires_grad=False))
        original(form, layer)


def _peak(layer: Any, floats: Tensor) -> Tensor:
    """The absolute maximum of the whole layer, that of other ranks' shards included.

    Before 0.28, vLLM has no such question, and each rank has a divisor of its own.
    """
    peak = largest(floats.data).reshape(1)
    shape = (layer.output_size_per_partition, layer.input_size_per_partition)
    is_cut = shape != (layer.output_size, layer.input_size)
    ask = getattr(online, "amax_for_tp_weight_quant", None)  # flashquant answers it in an update
    whole: Tensor = peak if ask is None else ask(peak, is_cut)
    return whole


_MODULE = (
    "vllm.model_executor.layers.quantization.compressed_tensors.schemes."
    "compressed_tensors_w4a4_nvfp4:CompressedTensorsW4A4Fp4"
)

POINTS = (
    PatchPoint(
        f"{_MODULE}.create_weights",
        expects=("self", "layer", ...),
        wrapper=_create_weights,
    ),
    PatchPoint(
        f"{_MODULE}.process_weights_after_loading",
        expects=("self", "layer"),
        wrapper=_process_weights,
    ),
)
