"""The workers of one engine, and the store in which they vote."""

from __future__ import annotations

import itertools
from typing import Any

import torch.distributed
from torch.distributed.distributed_c10d import PrefixStore, _get_default_store

from flashquant.update import Ballot

# Workers create their models (a target, a draft) in the same order, so the count tells
# the ballots of a process apart, and means the same in all of them.
_models = itertools.count()


def ballot_for(vllm_config: Any) -> Ballot | None:
    """The voice of this worker among those that hold a shard of the same model.

    None where it holds the whole model. Data-parallel replicas are engines of their
    own: each is pushed to by itself.
    """
    size = vllm_config.parallel_config.world_size
    if size == 1:
        return None
    replica, rank = divmod(torch.distributed.get_rank(), size)
    store = PrefixStore(f"flashquant/{replica}/{next(_models)}", _get_default_store())
    backend = vllm_config.parallel_config.distributed_executor_backend
    return Ballot(store, rank, size, lockstep=backend != "external_launcher")
