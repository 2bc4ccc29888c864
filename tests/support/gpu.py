"""What engines of tests are told of a GPU, where there is one: `python -m pytest` runs on it."""

from __future__ import annotations

import importlib
import importlib.util
import sys
from types import ModuleType
from typing import Any

import torch

HAS_GPU = torch.cuda.is_available()
# Many small engines share it, in several processes: none may ask for nearly all of its memory,
# which is vLLM's default and has to be free at each start.
SHARE: dict[str, float] = {"gpu_memory_utilization": 0.02} if HAS_GPU else {}


def ipc_engine() -> Any:
    """vLLM's module of it, which up to 0.26 asks for Ray while it is imported, and not later."""
    lacks_ray = importlib.util.find_spec("ray") is None
    if lacks_ray:
        sys.modules["ray"] = ModuleType("ray")
    try:
        return importlib.import_module("vllm.distributed.weight_transfer.ipc_engine")
    finally:
        if lacks_ray:
            del sys.modules["ray"]
