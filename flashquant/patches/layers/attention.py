"""Which layers vLLM processes after all others: attention, and what looks like it."""

from __future__ import annotations

import vllm
from packaging.specifiers import SpecifierSet

if SpecifierSet(">=0.28").contains(vllm.__version__, prereleases=True):
    from vllm.model_executor.layers.attention import is_deferred_attention_layer
else:
    # vLLM 0.27 asks the same question in the middle of process_weights_after_loading.
    from vllm.model_executor.layers.attention import MMEncoderAttention
    from vllm.model_executor.layers.attention_layer_base import AttentionLayerBase

    def is_deferred_attention_layer(layer: object) -> bool:
        """Whether vLLM leaves this layer to the end."""
        return isinstance(layer, AttentionLayerBase | MMEncoderAttention) and hasattr(
            layer, "process_weights_after_loading"
        )


__all__ = ["is_deferred_attention_layer"]
