"""Picked when everything else was done, to see whether something of them is new.

`python -m tools.compatibility --only NAME` looks at one; the page has no rows of them, only a line.
"""

from __future__ import annotations

from collections.abc import Callable

from transformers import (
    ApertusConfig,
    ArceeConfig,
    Cohere2Config,
    Dots1Config,
    Ernie4_5_MoeConfig,
    Ernie4_5Config,
    Exaone4Config,
    FlexOlmoConfig,
    Glm4MoeConfig,
    GraniteConfig,
    GraniteMoeHybridConfig,
    GraniteMoeSharedConfig,
    HunYuanDenseV1Config,
    HunYuanMoEV1Config,
    Lfm2Config,
    Lfm2MoeConfig,
    MiniCPM3Config,
    NemotronHConfig,
    Olmo3Config,
    PhiConfig,
    PreTrainedConfig,
    SeedOssConfig,
    SmolLM3Config,
    StableLmConfig,
    Starcoder2Config,
    Zamba2Config,
)

from tools.architectures.moe import CHOSEN, EXPERT_INNER, EXPERTS
from tools.architectures.shapes import HEADS, HIDDEN, INNER, shaped

_MAMBA = {"mamba_d_head": 16, "mamba_d_state": 64, "mamba_n_groups": 1}
_SLIDING = {"sliding_window": 64, "layer_types": ["sliding_attention", "full_attention"]}

FURTHER: dict[str, Callable[[], PreTrainedConfig]] = {
    "apertus": lambda: shaped(ApertusConfig),
    "arcee": lambda: shaped(ArceeConfig),
    "cohere2": lambda: shaped(Cohere2Config, tie_word_embeddings=True, **_SLIDING),
    "ernie-4.5": lambda: shaped(Ernie4_5Config, use_bias=True),
    "exaone4": lambda: shaped(Exaone4Config, **_SLIDING),
    "granite": lambda: shaped(GraniteConfig, attention_bias=True),
    "minicpm3": lambda: shaped(MiniCPM3Config),
    "phi": lambda: shaped(PhiConfig),
    "seed-oss": lambda: shaped(SeedOssConfig),
    "smollm3": lambda: shaped(SmolLM3Config),
    "stablelm": lambda: shaped(StableLmConfig),
    "starcoder2": lambda: shaped(Starcoder2Config, sliding_window=64),
    "dots1": lambda: shaped(
        Dots1Config,
        n_routed_experts=EXPERTS,
        n_shared_experts=1,
        num_experts_per_tok=CHOSEN,
        moe_intermediate_size=EXPERT_INNER,
        first_k_dense_replace=1,
        n_group=1,
        topk_group=1,
        layer_types=["full_attention"] * 2,
    ),
    "flex-olmo": lambda: shaped(
        FlexOlmoConfig,
        num_experts=EXPERTS,
        num_experts_per_tok=CHOSEN,
        intermediate_size=EXPERT_INNER,
    ),
    "granite-moe-shared": lambda: shaped(
        GraniteMoeSharedConfig,
        num_local_experts=EXPERTS,
        num_experts_per_tok=CHOSEN,
        intermediate_size=EXPERT_INNER,
        shared_intermediate_size=INNER,
    ),
    "hunyuan-moe": lambda: shaped(HunYuanMoEV1Config, num_experts=EXPERTS, moe_topk=CHOSEN),
    "granite-hybrid": lambda: shaped(
        GraniteMoeHybridConfig,
        layer_types=["mamba", "attention"],
        num_local_experts=EXPERTS,
        num_experts_per_tok=CHOSEN,
        intermediate_size=EXPERT_INNER,
        shared_intermediate_size=INNER,
        mamba_n_heads=32,
        position_embedding_type="rope",
        **_MAMBA,
    ),
    # Its experts have no gates, and vLLM has no such kernel for a CPU.
    "nemotron-h": lambda: shaped(
        NemotronHConfig,
        num_hidden_layers=3,
        layers_block_type=["mamba", "attention", "mlp"],
        mamba_num_heads=32,
        mamba_head_dim=16,
        ssm_state_size=64,
        n_groups=1,
    ),
    # Convolutions over a few tokens between layers of attention.
    "lfm2": lambda: shaped(
        Lfm2Config,
        block_auto_adjust_ff_dim=False,
        conv_dim=HIDDEN,
        block_dim=HIDDEN,
        layer_types=["conv", "full_attention"],
        tie_word_embeddings=True,
    ),
    "lfm2-moe": lambda: shaped(
        Lfm2MoeConfig,
        num_hidden_layers=3,
        layer_types=["conv", "full_attention", "conv"],
        num_experts=EXPERTS,
        num_experts_per_tok=CHOSEN,
        moe_intermediate_size=EXPERT_INNER,
        num_dense_layers=1,
        tie_word_embeddings=True,
    ),
    "glm4-moe": lambda: shaped(
        Glm4MoeConfig,
        n_routed_experts=EXPERTS,
        num_experts_per_tok=CHOSEN,
        moe_intermediate_size=EXPERT_INNER,
        attention_bias=True,
        use_qk_norm=True,
    ),
    "ernie-4.5-moe": lambda: shaped(
        Ernie4_5_MoeConfig,
        moe_num_experts=EXPERTS,
        moe_k=CHOSEN,
        moe_intermediate_size=EXPERT_INNER,
        moe_layer_end_index=1,
    ),
    "hunyuan-dense": lambda: shaped(HunYuanDenseV1Config),
    "olmo3": lambda: shaped(Olmo3Config, **_SLIDING),
    # One block of attention that several layers share, each with an adapter of its own.
    "zamba2": lambda: shaped(
        Zamba2Config,
        num_hidden_layers=4,
        layers_block_type=["linear_attention", "hybrid", "linear_attention", "hybrid"],
        mamba_d_state=64,
        mamba_ngroups=1,
        n_mamba_heads=8,
        head_dim=128,
        num_key_value_heads=HEADS,
        tie_word_embeddings=True,
    ),
}
