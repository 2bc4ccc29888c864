"""Two policies of a tiny model: random weights, every name and layout as on the Hub."""

from __future__ import annotations

import json
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from flashquant.config.schemes import COMPRESSED
from flashquant.schemes import DEFINITIONS, Quantize, largest, nvfp4_matrix

# Widths are multiples of 128, for blocks; the vocabulary is none of 64, so that it is padded.
VOCABULARY = 1000
_HIDDEN, _INNER, _HEADS, _KV_HEADS, _HEAD_DIM, _LAYERS = 512, 1024, 8, 4, 64, 2
# Experts, those of a token, and their width. The CPU's blocks of fp8 want 32 rows of a gate.
_EXPERTS, _CHOSEN, _EXPERT_INNER = 32, 4, 256
# Of the compressed attention; kernels want 512 and 64.
_QUERY_RANK, _KV_RANK, _NOPE, _ROPE, _VALUE = 256, 512, 128, 64, 128

_ALL: dict[str, Any] = {
    "hidden_size": _HIDDEN,
    "intermediate_size": _INNER,
    "num_attention_heads": _HEADS,
    "num_key_value_heads": _KV_HEADS,
    "num_hidden_layers": _LAYERS,
    "vocab_size": VOCABULARY,
    "max_position_embeddings": 512,
    "rms_norm_eps": 1e-6,
    "rope_theta": 10000.0,
    "hidden_act": "silu",
    "tie_word_embeddings": False,
    "torch_dtype": "bfloat16",
}
_EXPERTS_OF: dict[str, Any] = {
    "num_experts_per_tok": _CHOSEN,
    "moe_intermediate_size": _EXPERT_INNER,
}
_CONFIGS: dict[str, dict[str, Any]] = {
    "llama": {
        "architectures": ["LlamaForCausalLM"],
        "model_type": "llama",
        "head_dim": _HEAD_DIM,
    },
    "qwen3-moe": {
        "architectures": ["Qwen3MoeForCausalLM"],
        "model_type": "qwen3_moe",
        "head_dim": _HEAD_DIM,
        "num_experts": _EXPERTS,
        "decoder_sparse_step": 1,
        "mlp_only_layers": [],
        "norm_topk_prob": True,
        **_EXPERTS_OF,
    },
    "deepseek-v2": {
        "architectures": ["DeepseekV2ForCausalLM"],
        "model_type": "deepseek_v2",
        "num_key_value_heads": _HEADS,
        "q_lora_rank": _QUERY_RANK,
        "kv_lora_rank": _KV_RANK,
        "qk_nope_head_dim": _NOPE,
        "qk_rope_head_dim": _ROPE,
        "v_head_dim": _VALUE,
        "n_routed_experts": _EXPERTS,
        "n_shared_experts": 1,
        "first_k_dense_replace": 1,
        "moe_layer_freq": 1,
        "norm_topk_prob": False,
        "routed_scaling_factor": 1.0,
        "scoring_func": "softmax",
        "topk_method": "greedy",
        "n_group": 1,
        "topk_group": 1,
        **_EXPERTS_OF,
    },
}
MODELS = tuple(_CONFIGS)
DENSE = "llama"
_FUSED = re.compile("[qkv]_proj|gate_proj|up_proj|q_a_proj|kv_a_proj_with_mqa")
_NVFP4 = ("packed", "scale", "global_scale")
_ROUTER = "re:.*mlp.gate$"


def write(folder: Path, model: str = DENSE) -> None:
    """Write `a` and `b`, and `b` again as each checkpoint of codes that vLLM alone serves.

    Args:
        folder: where they become folders.
        model: one of `MODELS`: dense, a mixture of experts, or that with compressed attention.

    """
    config = _ALL | _CONFIGS[model]
    for seed, policy in enumerate("ab"):
        dice = torch.Generator().manual_seed(seed)
        weights = {name: _random(name, shape, dice) for name, shape in _shapes(model)}
        _save(folder / policy, config, weights)
    for scheme, held in COMPRESSED.items():
        stored = {**held, "ignore": [*held["ignore"], _ROUTER]}
        if scheme in DEFINITIONS:
            packs = held["format"] == "pack-quantized"
            codes = _quantized(weights, DEFINITIONS[scheme], packs=packs)
        else:
            codes = _in_nvfp4(weights)
        _save(folder / f"b-{scheme}", {**config, "quantization_config": stored}, codes)


def has_routers_that_vllm_quantizes(folder: Path) -> bool:
    """Whether vLLM's online load makes codes of a policy's routers, which flashquant leaves alone.

    Args:
        folder: of the policy.

    """
    config = json.loads((folder / "config.json").read_text())
    return bool(config["model_type"] == "qwen3_moe")


def tensors(path: Path) -> dict[str, Tensor]:
    """What a trainer would push of a policy."""
    return load_file(path / "model.safetensors")


def _shapes(model: str) -> Iterator[tuple[str, tuple[int, ...]]]:
    yield "model.embed_tokens.weight", (VOCABULARY, _HIDDEN)
    for layer in range(_LAYERS):
        here = f"model.layers.{layer}"
        attention = _compressed_attention if model == "deepseek-v2" else _attention
        yield from attention(f"{here}.self_attn", has_norms=model == "qwen3-moe")
        if model == DENSE or (model == "deepseek-v2" and layer == 0):
            yield from _mlp(f"{here}.mlp", _INNER)
        else:
            yield from _experts(f"{here}.mlp", shares=model == "deepseek-v2")
        yield f"{here}.input_layernorm.weight", (_HIDDEN,)
        yield f"{here}.post_attention_layernorm.weight", (_HIDDEN,)
    yield "model.norm.weight", (_HIDDEN,)
    yield "lm_head.weight", (VOCABULARY, _HIDDEN)


def _attention(here: str, *, has_norms: bool) -> Iterator[tuple[str, tuple[int, ...]]]:
    query, key = _HEADS * _HEAD_DIM, _KV_HEADS * _HEAD_DIM
    yield f"{here}.q_proj.weight", (query, _HIDDEN)
    yield f"{here}.k_proj.weight", (key, _HIDDEN)
    yield f"{here}.v_proj.weight", (key, _HIDDEN)
    yield f"{here}.o_proj.weight", (_HIDDEN, query)
    if has_norms:
        yield f"{here}.q_norm.weight", (_HEAD_DIM,)
        yield f"{here}.k_norm.weight", (_HEAD_DIM,)


def _compressed_attention(here: str, *, has_norms: bool) -> Iterator[tuple[str, tuple[int, ...]]]:
    del has_norms  # it always has those of the ranks
    yield f"{here}.q_a_proj.weight", (_QUERY_RANK, _HIDDEN)
    yield f"{here}.q_a_layernorm.weight", (_QUERY_RANK,)
    yield f"{here}.q_b_proj.weight", (_HEADS * (_NOPE + _ROPE), _QUERY_RANK)
    yield f"{here}.kv_a_proj_with_mqa.weight", (_KV_RANK + _ROPE, _HIDDEN)
    yield f"{here}.kv_a_layernorm.weight", (_KV_RANK,)
    yield f"{here}.kv_b_proj.weight", (_HEADS * (_NOPE + _VALUE), _KV_RANK)
    yield f"{here}.o_proj.weight", (_HIDDEN, _HEADS * _VALUE)


def _experts(here: str, *, shares: bool) -> Iterator[tuple[str, tuple[int, ...]]]:
    yield f"{here}.gate.weight", (_EXPERTS, _HIDDEN)
    for expert in range(_EXPERTS):
        yield from _mlp(f"{here}.experts.{expert}", _EXPERT_INNER)
    if shares:
        yield from _mlp(f"{here}.shared_experts", _EXPERT_INNER)


def _mlp(here: str, inner: int) -> Iterator[tuple[str, tuple[int, ...]]]:
    yield f"{here}.gate_proj.weight", (inner, _HIDDEN)
    yield f"{here}.up_proj.weight", (inner, _HIDDEN)
    yield f"{here}.down_proj.weight", (_HIDDEN, inner)


def _random(name: str, shape: tuple[int, ...], dice: torch.Generator) -> Tensor:
    values = torch.randn(shape, generator=dice, device="cpu") * 0.06
    return (values + 1 if "norm" in name else values).bfloat16()


def _quantized(weights: dict[str, Tensor], quantize: Quantize, *, packs: bool) -> dict[str, Tensor]:
    """Every layer but the head and the routers in codes and scales, by the definition."""
    stored = {}
    for name, weight in weights.items():
        if "_proj" not in name:
            stored[name] = weight
            continue
        codes, stored[f"{name}_scale"] = quantize(weight)
        if packs:
            stored[f"{name}_packed"] = _packed(codes)
            stored[f"{name}_shape"] = torch.tensor(codes.shape)
        else:
            stored[name] = codes
    return stored


def _in_nvfp4(weights: dict[str, Tensor]) -> dict[str, Tensor]:
    """The same in NVFP4: what vLLM computes as one layer shares a divisor."""
    peaks, stored = dict[str, Tensor](), dict[str, Tensor]()
    for name, weight in weights.items():
        layer = _FUSED.sub("", name)
        peaks[layer] = torch.maximum(peaks.get(layer, largest(weight)), largest(weight))
    for name, weight in weights.items():
        if "_proj" not in name:
            stored[name] = weight
            continue
        for kind, made in zip(
            _NVFP4, nvfp4_matrix(weight, peaks[_FUSED.sub("", name)]), strict=True
        ):
            stored[f"{name}_{kind}"] = made
    return stored


def _packed(codes: Tensor) -> Tensor:
    """Eight codes of four bits in an int32, counted from 0, the first one lowest."""
    from_zero = codes.int() + 8
    return torch.stack([from_zero[:, i::8] << 4 * i for i in range(8)]).sum(0, dtype=torch.int32)


def _save(path: Path, config: dict[str, Any], weights: dict[str, Tensor]) -> None:
    path.mkdir(parents=True, exist_ok=True)
    (path / "config.json").write_text(json.dumps(config, indent=2) + "\n")
    save_file(weights, path / "model.safetensors", metadata={"format": "pt"})
