"""State spaces, alone or between attention layers: convolutions, A = -exp(A_log), gates.

32 heads, for a projection has rows for each, and the CPU's kernel for blocks of fp8 wants 32.
"""

from __future__ import annotations

from collections.abc import Callable

from transformers import (
    BambaConfig,
    FalconH1Config,
    Mamba2Config,
    MambaConfig,
    PreTrainedConfig,
    Qwen3NextConfig,
)

from tools.architectures.moe import CHOSEN, EXPERT_INNER, EXPERTS
from tools.architectures.shapes import HEAD_DIM, HIDDEN, LAYERS, alone, shaped

_STATES = {"mamba_n_heads": 32, "mamba_d_head": 16, "mamba_d_state": 64, "mamba_n_groups": 1}

HYBRID: dict[str, Callable[[], PreTrainedConfig]] = {
    "qwen3-next": lambda: shaped(
        Qwen3NextConfig,
        num_experts=EXPERTS,
        num_experts_per_tok=CHOSEN,
        moe_intermediate_size=EXPERT_INNER,
        shared_expert_intermediate_size=EXPERT_INNER,
        layer_types=["linear_attention", "full_attention"],
        linear_num_key_heads=4,
        linear_num_value_heads=16,
        linear_key_head_dim=HEAD_DIM,
        linear_value_head_dim=HEAD_DIM,
    ),
    "mamba": lambda: alone(
        MambaConfig, hidden_size=HIDDEN, num_hidden_layers=LAYERS, state_size=16, time_step_rank=16
    ),
    "mamba2": lambda: alone(
        Mamba2Config,
        hidden_size=HIDDEN,
        num_hidden_layers=LAYERS,
        num_heads=32,
        head_dim=16,
        state_size=64,
        n_groups=1,
    ),
    "bamba": lambda: shaped(BambaConfig, attn_layer_indices=[1], **_STATES),
    "falcon-h1": lambda: shaped(FalconH1Config, mamba_d_ssm=512, **_STATES),
}
