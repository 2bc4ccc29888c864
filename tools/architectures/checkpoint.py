"""A configuration and a seed become a checkpoint; the same seed, the same bytes."""

from __future__ import annotations

import json
import zlib
from collections.abc import Iterator
from pathlib import Path

import torch
from torch import Tensor, nn
from transformers import AutoModelForCausalLM, PreTrainedConfig
from transformers.utils.logging import disable_progress_bar


def write(name: str, seed: int, path: Path) -> Path:
    """Write a random bf16 checkpoint of an architecture, unless it is there.

    Args:
        name: one of `tools.architectures.ARCHITECTURES`.
        seed: another policy of the same model; 0 is a, 1 is b.
        path: a folder; made.

    """
    from tools.architectures import ARCHITECTURES

    if not (path / "model.safetensors").exists():
        config = ARCHITECTURES[name]()
        disable_progress_bar()
        model = AutoModelForCausalLM.from_config(config, dtype=torch.bfloat16).eval()
        for leaf, tensor in _persistent(model):
            # Each name rolls its own dice: a layer more changes nothing of the others.
            dice = torch.Generator().manual_seed(zlib.crc32(f"{seed} {leaf}".encode()))
            with torch.no_grad():
                tensor.copy_(_random(leaf, tensor, dice))
        model.save_pretrained(path)
        _complete(path / "config.json", model, config)
    return path


def _persistent(model: nn.Module) -> Iterator[tuple[str, Tensor]]:
    """Everything that is saved; what is tied comes once."""
    yield from model.named_parameters()
    saved = model.state_dict().keys()
    yield from ((name, buffer) for name, buffer in model.named_buffers() if name in saved)


def _random(name: str, like: Tensor, dice: torch.Generator) -> Tensor:
    """Values of the size that a trained model has, none of them 0 or 1."""
    values = torch.empty(like.shape, dtype=torch.float32)
    last = name.rpartition(".")[2]
    if last == "A_log":  # of a decay between -1 and -16
        return values.uniform_(0.0, 2.77, generator=dice)
    if last in ("dt_bias", "D"):
        return values.uniform_(0.1, 1.0, generator=dice)
    if last == "weight" and like.dim() == 1:
        # A norm. Gemma and Qwen3-Next keep 1 + w; what is there before says which.
        around = like.float().mean().round().item()
        return values.uniform_(around - 0.3, around + 0.3, generator=dice)
    if "bias" in last or last == "sinks":
        return values.normal_(0, 0.1, generator=dice)
    if last == "weight" and like.dim() == 3:  # a convolution over few steps
        return values.normal_(0, 0.4, generator=dice)
    return values.normal_(0, 0.06, generator=dice)


def _complete(file: Path, model: nn.Module, config: PreTrainedConfig) -> None:
    """What vLLM asks for and transformers leaves out."""
    said = json.loads(file.read_text())
    said["architectures"] = [type(model).__name__]
    for routing in ("topk_method", "scoring_func"):
        if hasattr(config, routing):
            said[routing] = getattr(config, routing)
    file.write_text(json.dumps(said, indent=2) + "\n")
