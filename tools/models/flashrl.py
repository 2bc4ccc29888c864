"""What FlashRL and llm-compressor do, written again from the published description.

A SmoothQuant W8A8 checkpoint of a bf16 one, the profile that FlashRL would make of the two, and
the arithmetic by which it quantizes a pushed tensor. Nothing of the library is used, on purpose.
"""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import torch
from safetensors.torch import save_file
from torch import Tensor

from tools.models import tiny_models

Fields = dict[str, dict[str, object]]

_AFTER = {
    "input_layernorm": ("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj"),
    "post_attention_layernorm": ("mlp.gate_proj", "mlp.up_proj"),
}


def make_smoothed(source: Path, path: Path, seed: int = 0) -> Path:
    """Write the W8A8 twin of a bf16 checkpoint: smoothed, then int8 with one scale a row.

    Norms are divided by s and the layers after them multiplied; `up` is divided by t and `down`
    multiplied. The scale of a row is absmax / 127.5, as compressed-tensors makes it.
    """
    weights = tiny_models.tensors(source)
    dice = torch.Generator().manual_seed(seed)
    smoothed = {name: tensor.float() for name, tensor in weights.items()}
    for prefix in _layers(weights):
        for norm, layers in _AFTER.items():
            name = f"{prefix}.{norm}.weight"
            factor = torch.empty(len(weights[name])).uniform_(0.4, 2.5, generator=dice)
            smoothed[name] = smoothed[name] / factor
            for layer in layers:
                smoothed[f"{prefix}.{layer}.weight"] *= factor
        up, down = f"{prefix}.mlp.up_proj.weight", f"{prefix}.mlp.down_proj.weight"
        factor = torch.empty(len(weights[up])).uniform_(0.4, 2.5, generator=dice)
        smoothed[up] /= factor.unsqueeze(1)
        smoothed[down] *= factor
    tiny_models.make_quantized(source, path)
    stored: dict[str, Tensor] = {}
    for name, tensor in smoothed.items():
        if name.endswith("_proj.weight"):
            scale = (tensor.abs().amax(dim=1, keepdim=True) / 127.5).clamp_min(1e-9)
            stored[name] = (tensor / scale).round().clamp(-128, 127).to(torch.int8)
            stored[f"{name}_scale"] = scale
        else:
            stored[name] = tensor.bfloat16()
    save_file(stored, path / "model.safetensors", metadata={"format": "pt"})
    return path


def make_profile(bf16: Path, w8a8: Path) -> Fields:
    """What FlashRL would save for the two checkpoints."""
    weights, stored = tiny_models.tensors(bf16), tiny_models.tensors(w8a8)
    profile: Fields = {}

    def note(name: str, input_scale: object, output_scale: object) -> None:
        profile[name] = {
            "input_scale": input_scale,
            "output_scale": output_scale,
            "type": stored[name].dtype,
        }

    for prefix in _layers(weights):
        for norm, layers in _AFTER.items():
            name = f"{prefix}.{norm}.weight"
            ratio = stored[name] / weights[name].float()
            note(name, ratio, 1.0)
            for layer in layers:
                weight = f"{prefix}.{layer}.weight"
                scale = stored[f"{weight}_scale"].view(-1, 1)
                if layer == "mlp.up_proj":
                    unsmoothed = weights[weight].float() / ratio.view(1, -1) / scale
                    codes = stored[weight].float()
                    beta = (codes * unsmoothed).sum(1) / (unsmoothed * unsmoothed).sum(1)
                    beta = beta.view(-1, 1)
                    scale = scale / beta
                note(weight, 1.0 / ratio.view(1, -1), 1.0 / scale)
        o = f"{prefix}.self_attn.o_proj.weight"
        note(o, 1.0, 1.0 / stored[f"{o}_scale"].view(-1, 1))
        down = f"{prefix}.mlp.down_proj.weight"
        note(down, 1.0 / beta.view(1, -1), 1.0 / stored[f"{down}_scale"].view(-1, 1))
    return profile


def quantize(name: str, weight: Tensor, profile: Fields) -> Tensor:
    """A pushed tensor as FlashRL hands it to vLLM."""
    if name not in profile:
        return weight
    fields = profile[name]
    product = weight * fields["output_scale"] * fields["input_scale"]
    if fields["type"] == torch.int8:
        return torch.round(product).clamp(min=-128, max=127).to(torch.int8)
    return product.to(fields["type"])


def quantize_and_prune(weights: dict[str, Tensor], profile: Fields) -> dict[str, Tensor]:
    """All tensors as FlashRL's `int8_prune` hands them to vLLM: the whole model at once."""
    stored = {name: quantize(name, weight, profile) for name, weight in weights.items()}
    for prefix in _layers(weights):
        for norm, layers in _AFTER.items():
            dead = [stored[f"{prefix}.{layer}.weight"].abs().sum(0) == 0 for layer in layers]
            stored[f"{prefix}.{norm}.weight"] *= ~torch.stack(dead).all(0)
    return stored


def make_expected(w8a8: Path, weights: dict[str, Tensor], profile: Fields, path: Path) -> Path:
    """Write the checkpoint that FlashRL's arithmetic makes of pushed weights.

    The codes and the norms are those of the weights, the scales those of the W8A8 checkpoint.
    """
    stored = tiny_models.tensors(w8a8)
    stored |= {name: quantize(name, weight, profile) for name, weight in weights.items()}
    shutil.copytree(w8a8, path)
    save_file(stored, path / "model.safetensors", metadata={"format": "pt"})
    return path


def _layers(weights: dict[str, Tensor]) -> list[str]:
    return sorted({".".join(n.split(".")[:3]) for n in weights if n.startswith("model.layers.")})


def config(path: Path, **entry: str) -> str:
    """Write a configuration of one entry; what FLASHRL_CONFIG is set to."""
    path.write_text(json.dumps({"configs": [entry]}))  # JSON is YAML
    return str(path)
