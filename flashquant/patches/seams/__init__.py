"""Where flashquant goes into vLLM: a short file a seam, each with its points.

engine_args   FLASHRL_CONFIG becomes engine arguments (logprobs)
loading       a session opens, from the creation of a model until it serves (attached, blame, peers)
towers        those of multimodal models stay in bf16
receiving     a transfer by NCCL is received to its end
reload        vLLM's own reload becomes a bracket; sleep: weights that are put away
worker        new methods on every worker; engine_core: the scheduler hears of it (derived, ahead)
moe, lora, cutlass   what vLLM needs before it can serve these in our schemes
int4, nvfp4          layers of schemes that vLLM has for packed checkpoints only
emulation            kernels that vLLM has for GPUs only, in software
"""

from __future__ import annotations

from flashquant.patches.seams import (
    ahead,
    cutlass,
    emulation,
    engine_args,
    engine_core,
    int4,
    loading,
    lora,
    moe,
    nvfp4,
    receiving,
    reload,
    sleep,
    towers,
    worker,
)
from flashquant.patches.seams.loading import session_of

__all__ = ["POINTS", "session_of"]

POINTS = (
    *engine_args.POINTS,
    *loading.POINTS,
    *towers.POINTS,
    *lora.POINTS,
    *reload.POINTS,
    *receiving.POINTS,
    *sleep.POINTS,
    *worker.POINTS,
    *engine_core.POINTS,
    *ahead.POINTS,
    *cutlass.POINTS,
    *moe.POINTS,
    *int4.POINTS,
    *nvfp4.POINTS,
    *emulation.POINTS,
)
