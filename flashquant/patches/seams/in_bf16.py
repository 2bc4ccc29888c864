"""Which linear layers and experts of a quantized model are in bf16 all the same, and why."""

from __future__ import annotations

import logging
from collections.abc import Iterator, Mapping, Sequence

from torch import nn
from vllm.config import VllmConfig
from vllm.model_executor.layers.fused_moe import UnquantizedFusedMoEMethod
from vllm.model_executor.layers.linear import UnquantizedLinearMethod

from flashquant.config.keep import modules_of
from flashquant.patches.decided import kept_by, lists_layers
from flashquant.patches.seams.moe import is_router
from flashquant.update import WhyInBf16, some_of

logger = logging.getLogger(__name__)

QUANTIZABLE = (UnquantizedLinearMethod, UnquantizedFusedMoEMethod)


def leaves_any(model: nn.Module) -> bool:
    """Whether any layer that could be quantized is not."""
    return any(isinstance(getattr(m, "quant_method", None), QUANTIZABLE) for m in model.modules())


def why_in_bf16(
    model: nn.Module,
    landed: Mapping[str, tuple[str, ...]],
    vllm_config: VllmConfig,
    towers: Sequence[str],
) -> dict[str, WhyInBf16]:
    """What stays in bf16, by its name in the checkpoint.

    Args:
        model: vLLM's.
        landed: the parameters in which each tensor of the checkpoint lands, by its name.
        vllm_config: of the engine.
        towers: the modules of the model that are left because vLLM marks them as towers.

    """
    kept, found = kept_by(vllm_config), dict[str, WhyInBf16]()
    for name, target in _each(landed):
        layer = model.get_submodule(target.rpartition(".")[0])
        if isinstance(getattr(layer, "quant_method", None), QUANTIZABLE):
            (module,) = modules_of([name])
            if module in kept:
                found[module] = "keep"
            elif any(target.startswith(f"{tower}.") for tower in towers):
                found[module] = "tower"
            else:
                found[module] = "router" if is_router(layer, vllm_config) else "vllm"
    _tell_listed(found, vllm_config)
    return found


def _each(landed: Mapping[str, tuple[str, ...]]) -> Iterator[tuple[str, str]]:
    return ((name, target) for name, targets in landed.items() for target in targets)


def _tell_listed(found: Mapping[str, WhyInBf16], vllm_config: VllmConfig) -> None:
    """FlashRL lists every linear layer there is, those of towers among them."""
    listed = [module for module, why in found.items() if why == "tower"]
    if listed and lists_layers(vllm_config):
        logger.warning(
            "the profile lists %s as quantized, which stay in bf16 as layers of a tower. Write "
            "`quantize_towers: true` in the entry to quantize what it lists of towers",
            some_of(listed),
        )
