"""Mixtures of experts, with shared experts, a compressed attention (MLA), or biases in both.

Sixteen experts: the CPU's kernel for blocks of fp8 refuses the gate of eight.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from transformers import (
    DeepseekV2Config,
    DeepseekV3Config,
    GptOssConfig,
    GraniteMoeConfig,
    MixtralConfig,
    OlmoeConfig,
    PreTrainedConfig,
    Qwen2MoeConfig,
    Qwen3MoeConfig,
)

from tools.architectures.shapes import HEAD_DIM, HEADS, INNER, LAYERS, shaped

EXPERTS, CHOSEN, EXPERT_INNER = 16, 4, 128

_EXPERTS = {"num_experts_per_tok": CHOSEN, "moe_intermediate_size": EXPERT_INNER}
_MLA: dict[str, Any] = {
    **_EXPERTS,
    "num_key_value_heads": HEADS,
    "n_routed_experts": EXPERTS,
    "n_shared_experts": 1,
    "first_k_dense_replace": 1,
    "kv_lora_rank": 512,  # with the 64 below, the only size of the CPU's MLA kernel
    "q_lora_rank": 128,
    "qk_nope_head_dim": HEAD_DIM,
    "qk_rope_head_dim": HEAD_DIM,
    "v_head_dim": HEAD_DIM,
    "rope_interleave": True,
}

MOE: dict[str, Callable[[], PreTrainedConfig]] = {
    "qwen2-moe": lambda: shaped(
        Qwen2MoeConfig, **_EXPERTS, num_experts=EXPERTS, shared_expert_intermediate_size=INNER
    ),
    "qwen3-moe": lambda: shaped(
        Qwen3MoeConfig, **_EXPERTS, num_experts=EXPERTS, decoder_sparse_step=1, mlp_only_layers=[]
    ),
    # As wide as what a rank has of 1408 (DeepSeek-V2-Lite): vLLM pads experts to whole blocks.
    "qwen3-moe-narrow": lambda: shaped(
        Qwen3MoeConfig,
        **{**_EXPERTS, "moe_intermediate_size": 192},
        num_experts=EXPERTS,
        decoder_sparse_step=1,
        mlp_only_layers=[],
    ),
    "mixtral": lambda: shaped(
        MixtralConfig,
        num_local_experts=EXPERTS,
        num_experts_per_tok=CHOSEN,
        intermediate_size=EXPERT_INNER,
    ),
    "granite-moe": lambda: shaped(
        GraniteMoeConfig,
        num_local_experts=EXPERTS,
        num_experts_per_tok=CHOSEN,
        intermediate_size=EXPERT_INNER,
    ),
    "olmoe": lambda: shaped(
        OlmoeConfig,
        num_experts=EXPERTS,
        num_experts_per_tok=CHOSEN,
        intermediate_size=EXPERT_INNER,
    ),
    "deepseek-v2": lambda: shaped(
        DeepseekV2Config, **_MLA, topk_method="greedy", n_group=1, topk_group=1
    ),
    "deepseek-v2-lite": lambda: shaped(
        DeepseekV2Config,
        **{**_MLA, "q_lora_rank": None},
        topk_method="greedy",
        n_group=1,
        topk_group=1,
    ),
    # The attention alone: also in schemes for which the engine has no kernel of experts.
    "deepseek-v2-dense": lambda: shaped(
        DeepseekV2Config,
        **{**_MLA, "first_k_dense_replace": LAYERS},
        topk_method="greedy",
        n_group=1,
        topk_group=1,
    ),
    "deepseek-v3": lambda: shaped(
        # transformers 5 leaves both out; vLLM would load no correction, and take a softmax.
        DeepseekV3Config,
        **_MLA,
        topk_method="noaux_tc",
        scoring_func="sigmoid",
        n_group=4,
        topk_group=2,
    ),
    "gpt-oss": lambda: shaped(
        GptOssConfig,
        num_local_experts=EXPERTS,
        num_experts_per_tok=CHOSEN,
        intermediate_size=EXPERT_INNER,
        sliding_window=64,
        layer_types=["sliding_attention", "full_attention"],
    ),
}
