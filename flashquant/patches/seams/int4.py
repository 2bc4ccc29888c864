"""int4: a bf16 checkpoint into layers of four bits, which vLLM has for packed checkpoints only.

A layer of compressed-tensors' pack-quantized form wants its codes packed, eight in an int32, under
a name of their own. While it is loaded, it holds them here as other schemes do, a code a byte under
the name of the weight, and they are packed right before vLLM's own processing. So shards of rows
and of columns are cut by the loader that cuts every weight.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import nn
from vllm.config import get_current_vllm_config_or_none
from vllm.model_executor.layers.quantization.utils.quant_utils import (
    pack_quantized_values_into_int32,
)
from vllm.model_executor.parameter import ModelWeightParameter, PackedvLLMParameter
from vllm.platforms import current_platform

from flashquant.config.schemes import INT4
from flashquant.patches.decided import schemes_of
from flashquant.patches.point import PatchPoint

_ON_CPU = "cpu_gemm_wna16"
_PACKED, _CODES = "weight_packed", "weight"
_SHAPE = "weight_shape"  # of a checkpoint, for whoever unpacks it; no kernel reads it


def _create_weights(original: Any, form: Any, layer: nn.Module, *args: Any, **kwargs: Any) -> None:
    if not schemes_of(get_current_vllm_config_or_none()) & INT4.keys():
        original(form, layer, *args, **kwargs)
        return
    width: int = kwargs["input_size_per_partition"]
    _check_width(width, form.group_size)
    _check_kernel()
    original(form, layer, *args, **kwargs)
    packed = layer.get_parameter(_PACKED)
    loader: Any = packed
    codes = ModelWeightParameter(
        data=torch.empty(len(packed), width, dtype=torch.int8, device=packed.device),
        input_dim=1,
        output_dim=0,
        weight_loader=loader.weight_loader,
    )
    for name in (_PACKED, _SHAPE):
        delattr(layer, name)
    layer.register_parameter(_CODES, codes)


def _process_weights(original: Any, form: Any, layer: nn.Module) -> None:
    codes = layer._parameters.get(_CODES)
    if codes is not None and codes.dtype == torch.int8:
        delattr(layer, _CODES)
        layer.register_parameter(_PACKED, _packed(form, codes))
    original(form, layer)


def _packed(form: Any, codes: Any) -> PackedvLLMParameter:
    """What the loader of a packed checkpoint would have filled: `[N, K / 8]`, int32."""
    from_zero = codes.data.int() - form.quant_type.min()
    return PackedvLLMParameter(
        data=pack_quantized_values_into_int32(from_zero, form.quant_type, 1),
        input_dim=1,
        output_dim=0,
        packed_dim=1,
        packed_factor=form.pack_factor,
        weight_loader=codes.weight_loader,
    )


def _check_width(width: int, group: int) -> None:
    """vLLM would leave out the columns after the last whole group.

    Raises:
        ValueError: there are such columns; who calls names the layer.

    """
    if group > 0 and width % group:
        raise ValueError(
            f"its {width} input channels are no multiple of groups of {group}; use "
            f"{_fitting(width)}"
        )


def _check_kernel() -> None:
    """VLLM chooses its kernel for CPUs whether it is in the build for this one, or not.

    Raises:
        ValueError: it is not; who calls names the layer.

    """
    if current_platform.is_cpu() and not hasattr(torch.ops._C, _ON_CPU):
        raise ValueError(
            f"vLLM's build for this CPU has no kernel of four bits ({_ON_CPU}); x86 needs AVX-512"
        )


def _fitting(width: int) -> str:
    return " or ".join(name for name, group in INT4.items() if group == -1 or not width % group)


_MODULE = (
    "vllm.model_executor.layers.quantization.compressed_tensors.schemes.compressed_tensors_wNa16"
)

POINTS = (
    PatchPoint(
        f"{_MODULE}:CompressedTensorsWNA16.create_weights",
        expects=("self", "layer", "output_size", ...),
        wrapper=_create_weights,
    ),
    PatchPoint(
        f"{_MODULE}:CompressedTensorsWNA16.process_weights_after_loading",
        expects=("self", "layer"),
        wrapper=_process_weights,
    ),
)
