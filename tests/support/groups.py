"""The groups of a worker, of which vLLM makes a process's once: for its first engine."""

from __future__ import annotations

from vllm.distributed import parallel_state

from tests.support.gpu import HAS_GPU


def make_experts_group() -> None:
    """What an engine with experts needs, if the first one of this process was a dense one.

    vLLM then made the other groups, will not make any again, and fails at the first experts
    with "expert parallel group is not initialized". Its engine cores have a process each.
    """
    if parallel_state.model_parallel_is_initialized() and parallel_state._EP is None:
        world = parallel_state.get_world_group()
        backend = "nccl" if HAS_GPU else "gloo"
        parallel_state._EP = parallel_state.init_model_parallel_group(
            [world.ranks], world.local_rank, backend, group_name="ep"
        )
