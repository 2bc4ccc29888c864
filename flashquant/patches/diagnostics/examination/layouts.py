"""What vLLM has chosen for a model, and how its kernels keep their weights."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor, nn

from flashquant.config.schemes import ONLINE
from flashquant.patches.layers import LayerBlueprint, MemoryLayout, is_processor, memory_layouts
from flashquant.patches.seams.loading import session_of
from flashquant.schemes import DEFINITIONS


def kernel_of(holder: object) -> str:
    """The name of the kernel class that serves a module, if vLLM quantizes it.

    Args:
        holder: a module, or one of the processors in it.

    """
    for processor in filter(is_processor, vars(holder).values()):
        if type(processor).__module__.startswith("vllm.model_executor.kernels.linear"):
            return type(processor).__name__
        if (experts := getattr(processor, "experts_cls", None)) is not None:
            return str(experts.__name__)
        if inner := kernel_of(processor):
            return inner
    return ""


def stored(live: nn.Module) -> Iterator[tuple[str, str, dict[str, MemoryLayout]]]:
    """Each layer that has a kernel: its name, the kernel's, and how its parameters are stored.

    One processing of a twin each, on random values.
    """
    session = session_of(live)
    engine: Any = session._engine
    for layer in engine.layers:
        for blueprint in layer.blueprints:
            if kernel := kernel_of(blueprint.module):
                values = _random_values(blueprint, engine.device)
                with engine._context():
                    twin = blueprint.build(values)
                    quantize = DEFINITIONS.get(engine.scheme) if engine.scheme in ONLINE else None
                    yield blueprint.name, kernel, memory_layouts(twin, values, quantize)


def describe(live: nn.Module) -> str:
    """The kernels of a model and their memory layouts, in a line."""
    found: dict[str, None] = {}
    for _, kernel, parameters in stored(live):
        kinds = ", ".join(f"{name} {layout.kind}" for name, layout in parameters.items())
        found[f"{kernel} ({kinds})"] = None
    return "; ".join(found) or "no kernel of a quantized layer"


def _random_values(blueprint: LayerBlueprint, device: torch.device) -> dict[str, Tensor]:
    dice = torch.Generator().manual_seed(0)
    metas = blueprint.parameters.items()
    return {name: _random(meta, dice).to(device) for name, meta in metas if meta is not None}


def _random(meta: Tensor, dice: torch.Generator) -> Tensor:
    if meta.dtype == torch.int8:
        made = torch.randint(-127, 128, meta.shape, generator=dice, device="cpu")
        return made.to(torch.int8)
    spread = torch.randn(meta.shape, generator=dice, device="cpu")
    # What is in float32 is a scale, and positive.
    return (spread.abs() if meta.dtype == torch.float32 else spread).to(meta.dtype)
