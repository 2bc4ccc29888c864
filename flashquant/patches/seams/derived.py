"""What an engine has made of its weights besides its layers, all of it, and what becomes of it.

prefix cache        keys and values of prompts     reset; running requests are computed anew
KV connector        the same, outside the engine   told to drop them; one that cannot: a warning
encoder cache       embeddings of images, sounds   reset in scheduler and workers, together
late interaction    embeddings of queries          reset with the encoder cache
EC connector        embeddings outside the engine  cannot be dropped: a warning
KV cache scales     of the first batch, if asked   stay: a warning (vLLM up to 0.27)
a draft             a model of its own             a warning; `status` tells its version
a shared head       the target's, in a draft       the same memory: updated with it
LoRA adapters       nothing: low-rank, beside the layers
multimodal cache    nothing: pixels and samples, before any weight; front end and core must agree
                    on what is in it, so it is left alone

Whatever vLLM adds belongs here.
"""

from __future__ import annotations

import logging
from collections.abc import Iterator
from typing import Any

from vllm.distributed.kv_transfer.kv_connector.v1.base import KVConnectorBase_V1

from flashquant.patches.seams import ahead, worker

logger = logging.getLogger(__name__)


def drop(core: Any) -> None:
    """The weights are new: nothing that was made of the old ones is used again."""
    try:
        dropped = ahead.preempt(core, reset_connector=True)
    except RuntimeError as failure:  # requests that wait for keys and values of a connector
        logger.error("old keys and values are still in use: %s", failure)
        dropped = True
    if not dropped:
        logger.warning(
            "old keys and values may be used again: vLLM did not reset its prefix cache, or that "
            "of its KV connector; its log says why"
        )
    if has_encoder(core):
        # Both halves, always: a scheduler that believes in an embedding which its workers have
        # dropped ends the engine.
        core.scheduler.reset_encoder_cache()
        core.model_executor.collective_rpc(worker.FORGET)


def has_encoder(core: Any) -> bool:
    """Whether the engine keeps embeddings that an encoder made of something."""
    model = core.vllm_config.model_config
    return bool(model.is_multimodal_model) or model.runner_type == "pooling"


def warn(core: Any) -> None:
    """Say once, as the engine starts, what will outlive the weights it was made of."""
    for connector in _connectors(core.scheduler.get_kv_connector()):
        if type(connector).reset_cache is KVConnectorBase_V1.reset_cache:
            logger.warning(
                "the KV connector %s cannot be told to drop what it keeps: after an update, a "
                "prompt whose prefix it holds is answered from keys and values of the old weights. "
                "Empty its storage after each update, or serve without it.",
                type(connector).__name__,
            )
    outside = getattr(core.scheduler, "ec_connector", None)
    if outside is not None:
        logger.warning(
            "vLLM cannot tell the encoder connector %s to drop what it keeps: after an update, "
            "images that it holds are answered from embeddings of the old weights. Empty its "
            "storage after each update, or serve without it.",
            type(outside).__name__,
        )
    if getattr(core.vllm_config.cache_config, "calculate_kv_scales", False):
        logger.warning(
            "calculate_kv_scales makes the scales of the KV cache of the first batch, and keeps "
            "them: after an update they are still those of the old weights, and a restart would "
            "make others. Serve without it: vLLM then takes them from the checkpoint, or 1.0."
        )


def _connectors(connector: Any) -> Iterator[Any]:
    """Each one, where several are one."""
    if connector is None:
        return
    several = getattr(connector, "_connectors", None)
    if several is None:
        yield connector
        return
    for inner in several:
        yield from _connectors(inner)
