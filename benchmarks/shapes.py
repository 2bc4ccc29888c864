"""Random checkpoints in the shapes and under the names of real models; nothing is downloaded."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from torch import Tensor

_QWEN2: dict[str, Any] = {
    "architectures": ["Qwen2ForCausalLM"],
    "model_type": "qwen2",
    "hidden_act": "silu",
    "vocab_size": 151936,
    "max_position_embeddings": 32768,
    "num_key_value_heads": 2,
    "rms_norm_eps": 1e-6,
    "rope_theta": 1e6,
    "tie_word_embeddings": True,
    "torch_dtype": "bfloat16",
}
CONFIGS: dict[str, dict[str, Any]] = {
    "qwen2.5-0.5b": _QWEN2
    | {
        "hidden_size": 896,
        "intermediate_size": 4864,
        "num_hidden_layers": 24,
        "num_attention_heads": 14,
    },
    "qwen2.5-1.5b": _QWEN2
    | {
        "hidden_size": 1536,
        "intermediate_size": 8960,
        "num_hidden_layers": 28,
        "num_attention_heads": 12,
    },
    "qwen2.5-7b": _QWEN2
    | {
        "vocab_size": 152064,
        "hidden_size": 3584,
        "intermediate_size": 18944,
        "num_hidden_layers": 28,
        "num_attention_heads": 28,
        "num_key_value_heads": 4,
        "tie_word_embeddings": False,
    },
    "qwen3-moe": _QWEN2
    | {
        "architectures": ["Qwen3MoeForCausalLM"],
        "model_type": "qwen3_moe",
        "vocab_size": 8192,
        "hidden_size": 256,
        "intermediate_size": 512,
        "moe_intermediate_size": 64,
        "num_hidden_layers": 12,
        "num_attention_heads": 4,
        "head_dim": 64,
        "num_experts": 128,
        "num_experts_per_tok": 8,
        "norm_topk_prob": True,
        "decoder_sparse_step": 1,
        "mlp_only_layers": [],
        "tie_word_embeddings": False,
    },
}


def write(config: dict[str, Any], path: Path, device: torch.device | str = "cpu") -> None:
    """Write a checkpoint with random weights into a folder that is there.

    Args:
        config: one of `CONFIGS`.
        path: the folder.
        device: where the weights are drawn; the same seed gives others on another device.

    """
    (path / "config.json").write_text(json.dumps(config, indent=2) + "\n")
    dice = torch.Generator(device).manual_seed(0)
    weights = {name: _random(name, shape, dice).cpu() for name, shape in shapes(config).items()}
    save_file(weights, path / "model.safetensors", metadata={"format": "pt"})


def _random(name: str, shape: torch.Size, dice: torch.Generator) -> Tensor:
    empty = torch.empty(shape, dtype=torch.bfloat16, device=dice.device)
    return empty.fill_(1) if "norm" in name else empty.normal_(0, 0.02, generator=dice)


def shapes(config: dict[str, Any]) -> dict[str, torch.Size]:
    """Every tensor of a checkpoint, in the order and under the names that the Hub has."""
    hidden, layers = config["hidden_size"], config["num_hidden_layers"]
    found = {"model.embed_tokens.weight": (config["vocab_size"], hidden)}
    for index in range(layers):
        found |= {f"model.layers.{index}.{name}": s for name, s in _layer(config).items()}
    found["model.norm.weight"] = (hidden,)
    if not config["tie_word_embeddings"]:
        found["lm_head.weight"] = (config["vocab_size"], hidden)
    return {name: torch.Size(shape) for name, shape in found.items()}


def _layer(config: dict[str, Any]) -> dict[str, tuple[int, ...]]:
    hidden, heads = config["hidden_size"], config["num_attention_heads"]
    head = config.get("head_dim", hidden // heads)
    rows = {"q": heads * head, "k": config["num_key_value_heads"] * head}
    rows["v"] = rows["k"]
    sparse = "num_experts" in config
    shapes: dict[str, tuple[int, ...]] = {"input_layernorm.weight": (hidden,)}
    for key, count in rows.items():
        shapes[f"self_attn.{key}_proj.weight"] = (count, hidden)
        if not sparse:  # Qwen3 has norms instead of biases
            shapes[f"self_attn.{key}_proj.bias"] = (count,)
    shapes["self_attn.o_proj.weight"] = (hidden, heads * head)
    shapes["post_attention_layernorm.weight"] = (hidden,)
    if not sparse:
        return shapes | _mlp("mlp", config["intermediate_size"], hidden)
    shapes |= {f"self_attn.{key}_norm.weight": (head,) for key in "qk"}
    shapes["mlp.gate.weight"] = (config["num_experts"], hidden)
    for expert in range(config["num_experts"]):
        shapes |= _mlp(f"mlp.experts.{expert}", config["moe_intermediate_size"], hidden)
    return shapes


def _mlp(prefix: str, inner: int, hidden: int) -> dict[str, tuple[int, ...]]:
    return {
        f"{prefix}.gate_proj.weight": (inner, hidden),
        f"{prefix}.up_proj.weight": (inner, hidden),
        f"{prefix}.down_proj.weight": (hidden, inner),
    }
