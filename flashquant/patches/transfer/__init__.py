"""vLLM's weight-update calls on machines without NCCL: two engines in its own registry.

    --weight-transfer-config '{"backend": "flashquant_file"}'   a folder that both sides see
    --weight-transfer-config '{"backend": "flashquant_gloo"}'   over TCP, from trainer to workers

Both are bracketed by start_weight_update and finish_weight_update, as vLLM's own are;
what they bring goes through `model.load_weights` like everything else.
"""

from __future__ import annotations

from collections.abc import Callable

from vllm.distributed.weight_transfer.factory import (
    WeightTransferEngineFactory,
    WeightTransferTrainerFactory,
)

FILE, GLOO = "flashquant_file", "flashquant_gloo"


def register() -> Callable[[], None]:
    """Add both backends to vLLM's registries; returns what takes them out again."""
    engines, trainers = WeightTransferEngineFactory, WeightTransferTrainerFactory
    engines.register_engine(FILE, f"{__name__}.files", "FileEngine")
    engines.register_engine(GLOO, f"{__name__}.gloo", "GlooEngine")
    trainers.register_engine(GLOO, f"{__name__}.gloo", "GlooTrainer")

    def unregister() -> None:
        for name in (FILE, GLOO):
            engines._registry.pop(name, None)
        trainers._registry.pop(GLOO, None)

    return unregister
