"""Two policies of a tiny Llama: random weights, every name and layout as on the Hub."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from flashquant.schemes.int8 import int8_channel
from flashquant.smoothing import W8A8

# Widths are multiples of 128, for blocks; the vocabulary is none of 64, so that it is padded.
_HIDDEN, _INNER, _HEADS, _KV_HEADS, _HEAD_DIM, _LAYERS, _VOCAB = 512, 1024, 8, 4, 64, 2, 1000
VOCABULARY = _VOCAB

_CONFIG: dict[str, Any] = {
    "architectures": ["LlamaForCausalLM"],
    "model_type": "llama",
    "hidden_size": _HIDDEN,
    "intermediate_size": _INNER,
    "num_attention_heads": _HEADS,
    "num_key_value_heads": _KV_HEADS,
    "head_dim": _HEAD_DIM,
    "num_hidden_layers": _LAYERS,
    "vocab_size": _VOCAB,
    "max_position_embeddings": 512,
    "rms_norm_eps": 1e-6,
    "hidden_act": "silu",
    "tie_word_embeddings": False,
    "torch_dtype": "bfloat16",
}


def write(folder: Path) -> None:
    """Write `a` and `b`, and `b` once more as a W8A8 checkpoint: what vLLM alone serves in int8."""
    for seed, policy in enumerate("ab"):
        dice = torch.Generator().manual_seed(seed)
        weights = {name: _random(name, shape, dice) for name, shape in _shapes()}
        _save(folder / policy, _CONFIG, weights)
        if policy == "b":
            _save(folder / "b-int8", {**_CONFIG, "quantization_config": W8A8}, _quantized(weights))


def tensors(path: Path) -> dict[str, Tensor]:
    """What a trainer would push of a policy."""
    return load_file(path / "model.safetensors")


def _shapes() -> Iterator[tuple[str, tuple[int, ...]]]:
    query, key = _HEADS * _HEAD_DIM, _KV_HEADS * _HEAD_DIM
    yield "model.embed_tokens.weight", (_VOCAB, _HIDDEN)
    for layer in range(_LAYERS):
        here = f"model.layers.{layer}"
        yield f"{here}.self_attn.q_proj.weight", (query, _HIDDEN)
        yield f"{here}.self_attn.k_proj.weight", (key, _HIDDEN)
        yield f"{here}.self_attn.v_proj.weight", (key, _HIDDEN)
        yield f"{here}.self_attn.o_proj.weight", (_HIDDEN, query)
        yield f"{here}.mlp.gate_proj.weight", (_INNER, _HIDDEN)
        yield f"{here}.mlp.up_proj.weight", (_INNER, _HIDDEN)
        yield f"{here}.mlp.down_proj.weight", (_HIDDEN, _INNER)
        yield f"{here}.input_layernorm.weight", (_HIDDEN,)
        yield f"{here}.post_attention_layernorm.weight", (_HIDDEN,)
    yield "model.norm.weight", (_HIDDEN,)
    yield "lm_head.weight", (_VOCAB, _HIDDEN)


def _random(name: str, shape: tuple[int, ...], dice: torch.Generator) -> Tensor:
    values = torch.randn(shape, generator=dice, device="cpu") * 0.06
    return (values + 1 if "norm" in name else values).bfloat16()


def _quantized(weights: dict[str, Tensor]) -> dict[str, Tensor]:
    """Every layer but the head in codes and scales, by the definition."""
    stored = {}
    for name, weight in weights.items():
        stored[name] = weight
        if name.endswith("_proj.weight"):
            stored[name], stored[f"{name}_scale"] = int8_channel(weight)
    return stored


def _save(path: Path, config: dict[str, Any], weights: dict[str, Tensor]) -> None:
    path.mkdir(parents=True, exist_ok=True)
    (path / "config.json").write_text(json.dumps(config, indent=2) + "\n")
    save_file(weights, path / "model.safetensors", metadata={"format": "pt"})
