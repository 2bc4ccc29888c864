"""The models that are measured: a real one, and random ones of real shapes.

    smollm2        SmolLM2-135M-Instruct, its own weights (see examples.demo.smollm2)
    qwen2.5-0.5b   the shapes of Qwen2.5-0.5B, random: 290 tensors, 988 MB
    qwen2.5-1.5b   the shapes of Qwen2.5-1.5B, random: 338 tensors, 3.1 GB
    qwen2.5-7b     the shapes of Qwen2.5-7B, random: 339 tensors, 15.2 GB
    qwen3-moe      a Qwen3-MoE of 12 layers with 128 small experts each: 4,720 tensors
    tiny           a Llama of two layers, to try things

Checkpoints are written once, into `.demo-cache/`.
"""

from __future__ import annotations

import shutil
import tempfile
from pathlib import Path

from torch import Tensor

from benchmarks.shapes import CONFIGS, write
from examples.demo import smollm2
from tools.models import tiny_models

Weights = dict[str, Tensor]

NAMES = ("smollm2", *CONFIGS, "tiny")


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
    write(CONFIGS[name], path)
