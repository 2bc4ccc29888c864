"""Tiny random checkpoints, each a faithful small sibling of a real architecture.

Biases and norms are random too, so that a reload that loses one is seen; in a
freshly initialised model they are all zeros and ones, and prove nothing.

    make("qwen2", 0, path)          bf16, as a trainer would send it
    make_quantized(path, other)     the same weights, int8 with one scale a row
"""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from tokenizers import Tokenizer
from tokenizers.models import WordLevel
from tokenizers.pre_tokenizers import WhitespaceSplit
from torch import Tensor
from transformers import (
    LlamaConfig,
    LlamaForCausalLM,
    PreTrainedConfig,
    PreTrainedModel,
    PreTrainedTokenizerFast,
    Qwen2Config,
    Qwen2ForCausalLM,
    Qwen3Config,
    Qwen3ForCausalLM,
)

_KINDS: dict[str, tuple[type[PreTrainedConfig], type[PreTrainedModel]]] = {
    "llama": (LlamaConfig, LlamaForCausalLM),
    "qwen2": (Qwen2Config, Qwen2ForCausalLM),
    "qwen3": (Qwen3Config, Qwen3ForCausalLM),
}

_HEAD_DIM = 64
# As llm-compressor leaves them alone.
_ROUTERS = (r".*mlp\.gate$", r".*block_sparse_moe\.gate$", r".*shared_expert_gate$")


def _stored_as(kind: str) -> dict[str, Any]:
    """The quantization config of a compressed-tensors checkpoint: a scale a channel, a token; of
    `int4` a scale a group, and none of tokens."""
    numbers: dict[str, Any] = {
        "num_bits": 8,
        "type": "int" if kind == "int8" else "float",
        "symmetric": True,
    }
    group: dict[str, Any] = {
        "targets": ["Linear"],
        "weights": {**numbers, "strategy": "channel", "dynamic": False},
        "input_activations": {**numbers, "strategy": "token", "dynamic": True},
    }
    if kind == "int4":
        numbers |= {"num_bits": 4, "type": "int", "strategy": "group", "group_size": 128}
        group = {"targets": ["Linear"], "weights": {**numbers, "dynamic": False}}
    forms = {"int8": "int-quantized", "int4": "pack-quantized"}
    return {
        "quant_method": "compressed-tensors",
        "format": forms.get(kind, "float-quantized"),
        "quantization_status": "compressed",
        "ignore": ["lm_head", *(f"re:{pattern}" for pattern in _ROUTERS)],
        "config_groups": {"group_0": group},
    }


def make(
    kind: str,
    seed: int,
    path: Path,
    *,
    tied: bool = False,
    hidden: int = 256,
    layers: int = 2,
    intermediate: int = 512,
) -> Path:
    """Write a random bf16 checkpoint of one architecture; the same seed, the same bytes.

    Heads are 64 wide, so `hidden` is a multiple of 128: vLLM's Qwen2 takes the head
    size from `hidden`, whatever `head_dim` says.
    """
    config_type, model_type = _KINDS[kind]
    config = config_type(
        vocab_size=1000,  # vLLM pads it to 1024: padding has to survive a reload
        hidden_size=hidden,
        intermediate_size=intermediate,
        num_hidden_layers=layers,
        num_attention_heads=hidden // _HEAD_DIM,
        num_key_value_heads=hidden // _HEAD_DIM // 2,
        head_dim=_HEAD_DIM,
        max_position_embeddings=512,
        initializer_range=0.06,
        tie_word_embeddings=tied,
        bos_token_id=None,
        eos_token_id=None,
        dtype=torch.bfloat16,
        architectures=[model_type.__name__],
    )
    with torch.device("meta"):
        shapes = {name: p.shape for name, p in model_type(config).named_parameters()}
    dice = torch.Generator().manual_seed(seed)
    _write(path, config.to_diff_dict(), {n: _random(n, shapes[n], dice) for n in sorted(shapes)})
    return path


def make_quantized(source: Path, path: Path, kind: str = "int8") -> Path:
    """Write the compressed-tensors sibling of a bf16 checkpoint: `int8` (W8A8), `fp8`,
    `fp8_tensor` (the same with one scale in all rows) or `int4` (packed, groups of 128).

    Every linear layer but `lm_head` and routers becomes codes `[N, K]` and float32 scales
    `[N, 1]`, experts one by one; activations are quantized per token by the engine. Of `int4`, the
    codes are eight in an int32, the scales bf16 `[N, K / 128]`, and activations stay.
    """
    if kind == "int4":
        return _make_packed(source, path)
    quantize = {
        "int8": quantize_rows,
        "fp8": quantize_rows_to_fp8,
        "fp8_tensor": quantize_tensor_to_fp8,
    }[kind]
    quantized: dict[str, Tensor] = {}
    for name, tensor in tensors(source).items():
        if _is_linear(name, tensor):
            quantized[name], quantized[f"{name}_scale"] = quantize(tensor)
        else:
            quantized[name] = tensor
    config = json.loads((source / "config.json").read_text())
    _write(path, config | {"quantization_config": _stored_as(kind)}, quantized)
    return path


def tensors(path: Path) -> dict[str, Tensor]:
    """Every tensor of a checkpoint, by its name in the file."""
    return load_file(path / "model.safetensors")


def quantize_rows(weight: Tensor) -> tuple[Tensor, Tensor]:
    """Int8 codes and one float32 scale a row, written without the library on purpose.

    scale = absmax / 127 and code = round_half_even(weight * (127 / absmax)), all in
    float32. A row of zeros counts as absmax 1: codes 0, and a scale nobody divides by 0.
    """
    rows = weight.to(torch.float32)
    absmax = rows.abs().max(dim=1, keepdim=True).values
    absmax = torch.where(absmax == 0, torch.ones_like(absmax), absmax)
    codes = torch.round(rows * torch.div(torch.tensor(127.0), absmax))  # a true division
    return codes.clamp(-128, 127).to(torch.int8), torch.div(absmax, torch.tensor(127.0))


def quantize_rows_to_fp8(weight: Tensor) -> tuple[Tensor, Tensor]:
    """e4m3 codes and one float32 scale a row: absmax / 448."""
    rows = weight.to(torch.float32)
    scales = torch.div(rows.abs().max(dim=1, keepdim=True).values, torch.tensor(448.0))
    return torch.div(rows, scales).to(torch.float8_e4m3fn), scales


def quantize_tensor_to_fp8(weight: Tensor) -> tuple[Tensor, Tensor]:
    """e4m3 codes by one scale, absmax / 448, whose reciprocal they are multiplied by."""
    scale = torch.div(weight.float().abs().max(), torch.tensor(448.0))
    codes = torch.mul(weight.float(), scale.reciprocal()).clamp(-448, 448)
    return codes.to(torch.float8_e4m3fn), scale.repeat(len(weight), 1)


def quantize_groups_to_int4(weight: Tensor, group: int = 128) -> tuple[Tensor, Tensor]:
    """Codes from -8 to 7 in int8, and a scale a group: absmax / 7.5, rounded to bf16."""
    groups = weight.float().unflatten(1, (-1, group))
    scales = torch.div(groups.abs().max(dim=2).values, torch.tensor(7.5)).to(torch.bfloat16)
    codes = torch.round(torch.div(groups, scales.float().unsqueeze(2))).clamp(-8, 7)
    return codes.flatten(1).to(torch.int8), scales


def _make_packed(source: Path, path: Path) -> Path:
    stored: dict[str, Tensor] = {}
    for name, tensor in tensors(source).items():
        if not _is_linear(name, tensor):
            stored[name] = tensor
            continue
        codes, stored[f"{name}_scale"] = quantize_groups_to_int4(tensor)
        parts = [(codes[:, i::8].int() + 8) << 4 * i for i in range(8)]
        stored[f"{name}_packed"] = torch.stack(parts).sum(0, dtype=torch.int32)
        stored[f"{name}_shape"] = torch.tensor(tensor.shape)
    config = json.loads((source / "config.json").read_text())
    _write(path, config | {"quantization_config": _stored_as("int4")}, stored)
    return path


def _random(name: str, shape: torch.Size, dice: torch.Generator) -> Tensor:
    if "norm" in name:
        values = torch.empty(shape).uniform_(0.7, 1.3, generator=dice)
    elif name.endswith(".bias"):
        values = torch.empty(shape).normal_(0, 0.1, generator=dice)
    else:
        values = torch.empty(shape).normal_(0, 0.06, generator=dice)
    return values.to(torch.bfloat16)


def _is_linear(name: str, tensor: Tensor) -> bool:
    layer = name.removesuffix(".weight")
    kept = layer in ("model.embed_tokens", "lm_head") or any(re.match(p, layer) for p in _ROUTERS)
    return tensor.ndim == 2 and not kept


def _write(path: Path, config: dict[str, Any], weights: dict[str, Tensor]) -> None:
    path.mkdir(parents=True, exist_ok=True)
    (path / "config.json").write_text(json.dumps(config, indent=2) + "\n")
    save_file(weights, path / "model.safetensors", metadata={"format": "pt"})


def add_tokenizer(path: Path) -> Path:
    """Give a checkpoint a tokenizer, which a server asks for: one word a token."""
    words = {f"w{number}": number for number in range(1000)}
    tokenizer = Tokenizer(WordLevel(words, unk_token="w0"))
    tokenizer.pre_tokenizer = WhitespaceSplit()
    PreTrainedTokenizerFast(tokenizer_object=tokenizer, unk_token="w0").save_pretrained(path)
    return path
