"""A tiny GLM-4-MoE that drafts for itself: a layer more (MTP), with the model's own head."""

from __future__ import annotations

import json
from pathlib import Path

import torch
from safetensors.torch import save_file
from torch import Tensor
from transformers import AutoModelForCausalLM, Glm4MoeConfig

from tools.architectures.moe import EXPERT_INNER, EXPERTS
from tools.architectures.shapes import HIDDEN, LAYERS, shaped
from tools.models import tiny_models


def make(path: Path, seed: int) -> Path:
    """Write a random bf16 checkpoint; the same seed, the same bytes."""
    config = shaped(
        Glm4MoeConfig,
        n_routed_experts=EXPERTS,
        n_shared_experts=1,
        num_experts_per_tok=4,
        moe_intermediate_size=EXPERT_INNER,
        first_k_dense_replace=1,
        n_group=1,
        topk_group=1,
        num_nextn_predict_layers=1,
        partial_rotary_factor=0.5,
    )
    AutoModelForCausalLM.from_config(config, dtype=torch.bfloat16).save_pretrained(path)
    said = json.loads((path / "config.json").read_text())
    said |= {"architectures": ["Glm4MoeForCausalLM"], "num_nextn_predict_layers": 1}
    (path / "config.json").write_text(json.dumps(said))
    weights = tiny_models.tensors(path)
    shapes = {name: tensor.shape for name, tensor in weights.items()} | _of_the_draft(weights)
    dice = torch.Generator().manual_seed(seed)
    values = {name: _random(name, shape, dice) for name, shape in sorted(shapes.items())}
    save_file(values, path / "model.safetensors", metadata={"format": "pt"})
    return path


def _of_the_draft(weights: dict[str, Tensor]) -> dict[str, torch.Size]:
    """A layer like the last one, and what joins it to the model."""
    last, own = f"model.layers.{LAYERS - 1}.", f"model.layers.{LAYERS}."
    like = {own + name.removeprefix(last): t.shape for name, t in weights.items() if last in name}
    norms = {own + name: torch.Size([HIDDEN]) for name in ("enorm.weight", "hnorm.weight")}
    norms[own + "shared_head.norm.weight"] = torch.Size([HIDDEN])
    return {**like, **norms, own + "eh_proj.weight": torch.Size([HIDDEN, 2 * HIDDEN])}


def _random(name: str, shape: torch.Size, dice: torch.Generator) -> Tensor:
    around = 1.0 if "norm" in name else 0.0
    return (torch.randn(shape, generator=dice) * 0.06 + around).bfloat16()
