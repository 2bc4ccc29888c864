"""The replicas of one server take the entries of FLASHRL_CONFIG in turn.

vLLM makes one configuration in the front end and gives it to every replica. Where the
entries differ, the front end makes one for each of them, sends all along, and a replica
picks its own as it starts. Replicas that are started one by one (`--data-parallel-rank`,
torchrun) need none of this: each has a front end of its own, and `engine_args` asks its rank.
"""

from __future__ import annotations

import copy
import os
from typing import Any

from flashquant.config.schema import config_from_env
from flashquant.errors import ConfigError
from flashquant.patches.channels import ENTRY, REPLICAS
from flashquant.patches.point import PatchPoint


def _create_engine_config(original: Any, args: Any, *rest: Any, **options: Any) -> Any:
    flash = config_from_env(os.environ)
    alone = args.data_parallel_size == 1 or args.data_parallel_rank is not None
    if flash is None or len(flash.configs) == 1 or alone:
        return original(args, *rest, **options)
    untouched = copy.deepcopy(args)  # vLLM and flashquant both write into them
    shared = original(args, *rest, **options)
    if shared.model_config.is_moe:
        raise ConfigError(
            f"{flash.source} has {len(flash.configs)} entries, and data-parallel ranks take them "
            "in turn; but the ranks of a mixture of experts compute every layer together, so they "
            "need one scheme. Leave one entry in the file."
        )
    replicas = []
    for entry in flash.configs:
        variant = copy.deepcopy(untouched)
        ENTRY.put(variant, entry)
        replicas.append(original(variant, *rest, **options))
    REPLICAS.put(shared, replicas)
    return shared


def _init_executor(original: Any, executor: Any, vllm_config: Any) -> None:
    """The first call in an engine core's process after it has loaded its plugins.

    The core itself holds this object already, so it is made into the replica's own.
    """
    if replicas := REPLICAS.get(vllm_config):
        place = vllm_config.parallel_config  # who and where it is among the others
        own = replicas[place.data_parallel_index % len(replicas)]
        vars(vllm_config).clear()
        vars(vllm_config).update(vars(own), parallel_config=place)
    original(executor, vllm_config)


POINTS = (
    PatchPoint(
        "vllm.engine.arg_utils:EngineArgs.create_engine_config",
        expects=("self", "usage_context", "headless"),
        wrapper=_create_engine_config,
    ),
    PatchPoint(
        "vllm.v1.executor.abstract:Executor.__init__",
        expects=("self", "vllm_config"),
        wrapper=_init_executor,
    ),
)
