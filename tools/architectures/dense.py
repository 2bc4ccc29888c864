"""Dense transformers: by which roads a checkpoint comes, tied heads and untied ones.

Among them: fused checkpoints (Phi-3, GLM-4), transposed weights (GPT-2), norms stored as
1 + w (Gemma), and two that vLLM serves through transformers' own code (GPT-NeoX, OLMo 2).
"""

from __future__ import annotations

from collections.abc import Callable

from transformers import (
    Gemma2Config,
    Gemma3nTextConfig,
    Gemma3TextConfig,
    Gemma4TextConfig,
    Glm4Config,
    GPT2Config,
    GPTNeoXConfig,
    LlamaConfig,
    MistralConfig,
    NemotronConfig,
    Olmo2Config,
    OPTConfig,
    Phi3Config,
    PreTrainedConfig,
    Qwen2Config,
    Qwen3Config,
)

from tools.architectures.shapes import (
    HEAD_DIM,
    HEADS,
    HIDDEN,
    INNER,
    LAYERS,
    LENGTH,
    VOCAB,
    alone,
    shaped,
)

_SLIDING = {"sliding_window": 64, "layer_types": ["sliding_attention", "full_attention"]}

DENSE: dict[str, Callable[[], PreTrainedConfig]] = {
    "llama": lambda: shaped(LlamaConfig),
    "llama-tied": lambda: shaped(LlamaConfig, tie_word_embeddings=True),
    "qwen2": lambda: shaped(Qwen2Config),
    "qwen2-tied": lambda: shaped(Qwen2Config, tie_word_embeddings=True),
    "qwen3": lambda: shaped(Qwen3Config),
    "qwen3-tied": lambda: shaped(Qwen3Config, tie_word_embeddings=True),
    "mistral": lambda: shaped(MistralConfig, sliding_window=64),
    "gemma2": lambda: shaped(
        Gemma2Config, tie_word_embeddings=True, query_pre_attn_scalar=HEAD_DIM, **_SLIDING
    ),
    "gemma3": lambda: shaped(
        Gemma3TextConfig, tie_word_embeddings=True, query_pre_attn_scalar=HEAD_DIM, **_SLIDING
    ),
    # Its last layers take keys and values from those before them.
    "gemma3n": lambda: shaped(
        Gemma3nTextConfig,
        num_hidden_layers=6,
        num_kv_shared_layers=2,
        sliding_window=64,
        layer_types=["sliding_attention", "sliding_attention", "full_attention"] * 2,
        vocab_size_per_layer_input=VOCAB,
        hidden_size_per_layer_input=2 * HEAD_DIM,
        laurel_rank=HEAD_DIM,
        altup_num_inputs=4,
        intermediate_size=[INNER] * 6,
        activation_sparsity_pattern=[0.95, 0.95, 0.0, 0.0, 0.0, 0.0],
        tie_word_embeddings=True,
    ),
    # Likewise; and its checkpoint has a buffer a layer.
    "gemma4": lambda: shaped(
        Gemma4TextConfig,
        num_hidden_layers=4,
        num_kv_shared_layers=2,
        sliding_window=64,
        layer_types=["sliding_attention", "full_attention"] * 2,
        vocab_size_per_layer_input=VOCAB,
        hidden_size_per_layer_input=2 * HEAD_DIM,
        tie_word_embeddings=True,
    ),
    "phi3": lambda: shaped(Phi3Config),
    "glm4": lambda: shaped(Glm4Config, attention_bias=True),
    "olmo2": lambda: shaped(Olmo2Config),
    "gpt-neox": lambda: alone(
        GPTNeoXConfig,
        hidden_size=HIDDEN,
        intermediate_size=INNER,
        num_hidden_layers=LAYERS,
        num_attention_heads=HEADS,
        max_position_embeddings=LENGTH,
    ),
    "gpt2": lambda: alone(
        GPT2Config,
        n_embd=HIDDEN,
        n_inner=INNER,
        n_layer=LAYERS,
        n_head=HEADS,
        n_positions=LENGTH,
        tie_word_embeddings=True,
    ),
    "opt": lambda: alone(
        OPTConfig,
        hidden_size=HIDDEN,
        ffn_dim=INNER,
        num_hidden_layers=LAYERS,
        num_attention_heads=HEADS,
        max_position_embeddings=LENGTH,
        word_embed_proj_dim=HIDDEN,
        tie_word_embeddings=True,
    ),
    # Picked once everything else was done: norms stored as 1 + w with biases, no gate.
    "nemotron": lambda: shaped(NemotronConfig, attention_bias=True, mlp_bias=True),
}
