"""The checkpoints that engine tests start on: two policies, A and B, of each model."""

from __future__ import annotations

import shutil
from dataclasses import dataclass
from pathlib import Path

import torch
from safetensors.torch import save_file
from torch import Tensor

from examples.demo import smollm2
from tools.architectures import write
from tools.models import tiny_models

TINY = ("qwen2", "llama", "qwen3", "tied")
W8A8, FP8 = "int8_w8a8", "fp8_channel_stored"
# Checkpoints that hold codes: the scheme they are served in, and what they store.
STORED = {W8A8: ("int8", "int8"), FP8: ("fp8_channel", "fp8")}
SCHEMES = ("bf16", "int8", W8A8, "fp8_vllm", "fp8_channel", "fp8_tensor")


@dataclass(frozen=True)
class Policies:
    """Where the two policies of one model lie, in bf16 and, for W8A8 engines, quantized."""

    folder: Path
    kind: str

    def bf16(self, policy: str) -> Path:
        """The checkpoint a trainer would write for policy `a` or `b`."""
        path = self.folder / f"{self.kind}-{policy}"
        if not path.exists():
            _make(self.kind, policy, path)
        return path

    def served(self, policy: str, scheme: str) -> Path:
        """The checkpoint an engine in this scheme starts on."""
        if scheme not in STORED:
            return self.bf16(policy)
        path = self.folder / f"{self.kind}-{policy}-{scheme}"
        if not path.exists():
            tiny_models.make_quantized(self.bf16(policy), path, STORED[scheme][1])
        return path

    def tensors(self, policy: str) -> dict[str, Tensor]:
        """What the trainer pushes."""
        return tiny_models.tensors(self.bf16(policy))


def config_name(scheme: str) -> str:
    """What FLASHRL_CONFIG says for a scheme of this list."""
    return STORED[scheme][0] if scheme in STORED else scheme


def _make(kind: str, policy: str, path: Path) -> None:
    if kind == "smollm2":
        _make_smollm2(policy, path)
    elif kind not in TINY:
        write(kind, "ab".index(policy), path)
    else:
        architecture = "qwen2" if kind == "tied" else kind
        tiny_models.make(architecture, "ab".index(policy), path, tied=kind == "tied")


def _make_smollm2(policy: str, path: Path) -> None:
    """The real weights; policy b moves each of them by about one percent."""
    shutil.copytree(smollm2.checkpoint(smollm2.default_cache_dir()), path)
    if policy == "b":
        dice = torch.Generator().manual_seed(1)
        moved = {
            name: (tensor * (1 + 0.01 * torch.randn(tensor.shape, generator=dice))).to(tensor.dtype)
            for name, tensor in tiny_models.tensors(path).items()
        }
        save_file(moved, path / "model.safetensors", metadata={"format": "pt"})
