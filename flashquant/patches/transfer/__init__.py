"""vLLM's weight-update calls on machines without NCCL: two engines in its own registry.

    --weight-transfer-config '{"backend": "flashquant_file"}'   a folder that both sides see
    --weight-transfer-config '{"backend": "flashquant_gloo"}'   over TCP, from trainer to workers

Both are bracketed by start_weight_update and finish_weight_update, as vLLM's own are;
what they bring goes through `model.load_weights` like everything else.
"""

from __future__ import annotations

from collections.abc import Callable

from vllm.distributed.weight_transfer import factory

from flashquant.patches.guard import vllm_is

# Before, whatever sends weights is written by hand; see `gloo_worker`.
_HAS_TRAINERS = vllm_is(">=0.26")

FILE, GLOO = "flashquant_file", "flashquant_gloo"


def register() -> Callable[[], None]:
    """Add both backends to vLLM's registries; returns what takes them out again."""
    engines = factory.WeightTransferEngineFactory
    engines.register_engine(FILE, f"{__name__}.files", "FileEngine")
    engines.register_engine(GLOO, f"{__name__}.gloo_worker", "GlooEngine")
    registries = [engines._registry]
    if _HAS_TRAINERS:
        trainers = factory.WeightTransferTrainerFactory
        trainers.register_engine(GLOO, f"{__name__}.gloo", "GlooTrainer")
        registries.append(trainers._registry)

    def unregister() -> None:
        for registry in registries:
            for name in (FILE, GLOO):
                registry.pop(name, None)

    return unregister
