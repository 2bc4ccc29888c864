"""The layers under an adapter can be loaded, in vLLM 0.27 too.

vLLM wraps them, so a checkpoint's `q_proj.weight` is `q_proj.base_layer.weight`.
Since 0.28 the wrapper hands what it is sent to the layer inside.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

from torch import Tensor

from flashquant.patches.point import PatchPoint


def _load_weights(wrapper: Any, weights: Iterable[tuple[str, Tensor]]) -> Iterable[str]:
    inner = wrapper.base_layer
    if not hasattr(inner, "load_weights"):  # a fused layer has one: it sorts its shards
        from vllm.model_executor.models.utils import AutoWeightsLoader

        inner = AutoWeightsLoader(inner)
    names: Iterable[str] = inner.load_weights(weights)
    return names


POINTS = (
    PatchPoint(
        "vllm.lora.layers.base:BaseLayerWithLoRA.load_weights",
        expects=None,
        wrapper=_load_weights,
        within="<0.28",
    ),
)
