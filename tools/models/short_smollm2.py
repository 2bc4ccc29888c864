"""The first layers of SmolLM2: real words, a real tokenizer, a tied head, and quick."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

from safetensors.torch import save_file

from examples.demo import smollm2
from tools.models import tiny_models

_LAYERS = 2


def make(path: Path) -> Path:
    """Write the checkpoint; what it says is nonsense, in English letters."""
    shutil.copytree(smollm2.checkpoint(smollm2.default_cache_dir()), path)
    config = json.loads((path / "config.json").read_text())
    (path / "config.json").write_text(json.dumps(config | {"num_hidden_layers": _LAYERS}))
    tensors = tiny_models.tensors(path)
    kept = {name: tensor for name, tensor in tensors.items() if _layer(name) < _LAYERS}
    save_file(kept, path / "model.safetensors", metadata={"format": "pt"})
    return path


def _layer(name: str) -> int:
    parts = name.split(".")
    return int(parts[2]) if parts[1] == "layers" else 0
