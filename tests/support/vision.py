"""torchvision's Python code, which image processors want, beside a torch for the CPU.

PyPI has torchvision for CUDA only; its binary cannot be loaded here, and without the two operators
that its Python code expects there, it cannot be imported. They are declared, and never called.
It lies in a folder of its own (see the Makefile), which only tests look into.
"""

from __future__ import annotations

import importlib.util
import sys
from pathlib import Path
from typing import Any

_FOLDER = Path(sys.prefix) / "vision"

_KEPT: list[Any] = []  # a library's declarations go with it


def is_there() -> bool:
    """Whether torchvision can be imported."""
    return importlib.util.find_spec("torchvision") is not None


def make_ready() -> None:
    """Let whoever imports torchvision succeed; before transformers does."""
    if not is_there() and _FOLDER.is_dir():
        sys.path.append(str(_FOLDER))
    spec = importlib.util.find_spec("torchvision")
    if spec is None or spec.origin is None or _KEPT:
        return
    import torch

    binary = Path(spec.origin).with_name("_C.so")
    try:
        torch.ops.load_library(str(binary))
    except OSError:
        _KEPT.append(torch.library.Library("torchvision", "DEF"))
        for name in ("nms", "qnms"):
            _KEPT[0].define(f"{name}(Tensor dets, Tensor scores, float iou_threshold) -> Tensor")
