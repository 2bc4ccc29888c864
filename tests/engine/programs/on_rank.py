"""What tests ask of a worker: vLLM imports `Pushed` into its process before it loads."""

from __future__ import annotations

import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from vllm.platforms import cpu as platform

from tests.engine.kernels import (
    WORKER_KERNELS,
    choosing,
    make_room_between_stages,
    mind_the_map_of_experts,
)
from tools.models import tiny_models

_CHOSEN = choosing(os.environ.get(WORKER_KERNELS, "native"))
_CHOSEN.__enter__()  # for good: the process serves one engine
platform.torch = torch  # which attention MLA has, the engine core decides, too
mind_the_map_of_experts()
make_room_between_stages()


def _spoiled(weights: dict[str, Tensor], name: str) -> dict[str, Tensor]:
    weights[name] = weights[name].clone()
    weights[name][3, 5] = float("nan")
    return weights


def layerwise_bracket(model: nn.Module, weights: dict[str, Tensor], config: Any) -> None:
    """Begin, chunks, end, with the functions of vLLM's package: SkyRL, prime-rl."""
    from vllm.model_executor.model_loader.reload import (
        finalize_layerwise_reload,
        initialize_layerwise_reload,
    )

    initialize_layerwise_reload(model)
    pairs = list(weights.items())
    for first in range(0, len(pairs), 5):
        model.load_weights(weights=iter(pairs[first : first + 5]))
    finalize_layerwise_reload(model, config)


def stacked_experts(model: nn.Module, weights: dict[str, Tensor]) -> None:
    """All experts of a layer in one tensor, as transformers 5 trains them."""
    from tests.engine.test_moe import stacked

    together = stacked(weights)
    assert any(tensor.dim() == 3 for tensor in together.values())
    for pair in together.items():
        model.load_weights([pair])


def _ways() -> dict[str, Callable[[nn.Module, dict[str, Tensor]], None]]:
    from tests.engine.test_reload_equals_restart import WAYS

    return {way.__name__: way for way in (*WAYS, stacked_experts)}


class Pushed:
    """Methods of a worker (`worker_extension_cls`); what is pushed is read from a checkpoint."""

    def take(self: Any, way: str, path: str, spoils: str = "") -> None:
        """Push a checkpoint into this rank's model, as a trainer would that knows no other."""
        weights = tiny_models.tensors(Path(path))
        weights = _spoiled(weights, spoils) if spoils else weights
        if way == "layerwise_bracket":
            layerwise_bracket(self.get_model(), weights, self.model_config)
        else:
            _ways()[way](self.get_model(), weights)

    def held_experts(self: Any) -> list[int]:
        """How many experts of each layer lie here."""
        from vllm.model_executor.layers.fused_moe import RoutedExperts

        modules = self.get_model().modules()
        return [m.w13_weight.shape[0] for m in modules if isinstance(m, RoutedExperts)]
