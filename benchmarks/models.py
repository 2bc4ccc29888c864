"""The models that are measured: a real one, and random ones of real shapes.

    smollm2        SmolLM2-135M-Instruct, its own weights (see examples.demo.smollm2)
    qwen2.5-0.5b   the shapes of Qwen2.5-0.5B, random: 290 tensors, 988 MB
    qwen2.5-1.5b   the shapes of Qwen2.5-1.5B, random: 338 tensors, 3.1 GB
    qwen3-moe      a Qwen3-MoE of 12 layers with 128 small experts each: 4,720 tensors
    tiny           a Llama of two layers, to try things

Checkpoints are written once, into `.demo-cache/`.
"""

from __future__ import annotations

import json
import shutil
import tempfile
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from torch import Tensor

from examples.demo import smollm2
from tests import tiny_models

Weights = dict[str, Tensor]

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
_SHAPES: dict[str, dict[str, Any]] = {
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
NAMES = ("smollm2", *_SHAPES, "tiny")


def checkpoint(name: str) -> Path:
    """The folder of a bf16 checkpoint, made when it is first asked for."""
    cache = smollm2.default_cache_dir()
    if name == "smollm2":
        return smollm2.checkpoint(cache)
    path = cache / name
    if not path.exists():
        smollm2.make_cache_dir(cache)
        unfinished = Path(tempfile.mkdtemp(prefix=f".{name}-", dir=cache))
        _write(name, unfinished)
        unfinished.rename(path)
    return path


def quantized(path: Path) -> Path:
    """The compressed-tensors W8A8 sibling of a checkpoint, codes of random or real weights."""
    sibling = path.with_name(f"{path.name}-w8a8")
    if not sibling.exists():
        unfinished = Path(tempfile.mkdtemp(prefix=f".{sibling.name}-", dir=path.parent))
        tiny_models.make_quantized(path, unfinished)
        shutil.rmtree(sibling, ignore_errors=True)
        unfinished.rename(sibling)
    return sibling


def both_policies(path: Path) -> tuple[Weights, Weights]:
    """What the engine starts on, and the same after a step of two percent."""
    weights = {name: tensor.clone() for name, tensor in tiny_models.tensors(path).items()}
    return weights, {name: (tensor * 1.02).to(tensor.dtype) for name, tensor in weights.items()}


def size(weights: Weights) -> int:
    """Bytes of all of them."""
    return sum(tensor.nbytes for tensor in weights.values())


def _write(name: str, path: Path) -> None:
    if name == "tiny":
        tiny_models.make("llama", 0, path)
        return
    (path / "config.json").write_text(json.dumps(_SHAPES[name], indent=2) + "\n")
    dice = torch.Generator().manual_seed(0)
    shapes = _shapes(_SHAPES[name])
    weights = {key: _random(key, shape, dice) for key, shape in shapes.items()}
    save_file(weights, path / "model.safetensors", metadata={"format": "pt"})


def _random(name: str, shape: torch.Size, dice: torch.Generator) -> Tensor:
    if "norm" in name:
        return torch.ones(shape, dtype=torch.bfloat16)
    return torch.empty(shape, dtype=torch.bfloat16).normal_(0, 0.02, generator=dice)


def _shapes(config: dict[str, Any]) -> dict[str, torch.Size]:
    """Every tensor of a checkpoint, in the order and under the names that the Hub has."""
    hidden, layers = config["hidden_size"], config["num_hidden_layers"]
    shapes = {"model.embed_tokens.weight": (config["vocab_size"], hidden)}
    for index in range(layers):
        shapes |= {f"model.layers.{index}.{name}": s for name, s in _layer(config).items()}
    shapes["model.norm.weight"] = (hidden,)
    if not config["tie_word_embeddings"]:
        shapes["lm_head.weight"] = (config["vocab_size"], hidden)
    return {name: torch.Size(shape) for name, shape in shapes.items()}


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
