"""One program a rank, as torchrun starts it: every rank pushes to its own worker.

Usage: python -m torch.distributed.run --nproc-per-node 2 -m \
           tests.engine.programs.external_launcher STARTS_ON PUSHED tensors|experts
The last says whether each rank has a part of everything, or every second expert.
Rank 0 prints one JSON object: what each rank held and what it raised, step by step.
"""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

from tests.engine.programs.engine import OPTIONS, print_result
from tests.engine.programs.failing import fail_in_the_middle, raised_by
from tools.models import tiny_models


def main(starts_on: str, pushed: str, cut: str) -> dict[str, Any] | None:
    import torch.distributed
    from vllm import LLM

    llm = LLM(
        starts_on,
        **OPTIONS,
        tensor_parallel_size=2,
        enable_expert_parallel=cut == "experts",
        worker_extension_cls="tests.engine.programs.on_rank.Pushed",
        distributed_executor_backend="external_launcher",
        seed=0,
    )
    import flashquant

    def push(checkpoint: str) -> Any:
        return flashquant.reload_weights(llm, tiny_models.tensors(Path(checkpoint)))

    mine: dict[str, Any] = {"started on a": flashquant.status(llm).digest}
    push(pushed)
    mine["pushed b"] = flashquant.status(llm).digest
    llm.collective_rpc(fail_in_the_middle, kwargs={"rank": 1, "dies": False})
    mine["raised"] = raised_by(lambda: push(starts_on))[:2]
    mine["rank 1 failed"] = flashquant.status(llm).digest
    push(starts_on)
    mine["pushed a"] = flashquant.status(llm).digest
    mine["experts"] = llm.collective_rpc("held_experts")[0]

    ranks: list[Any] = [None, None]
    torch.distributed.all_gather_object(ranks, mine)
    if torch.distributed.get_rank() > 0:
        return None
    return {key: [rank[key] for rank in ranks] for key in mine}


if __name__ == "__main__":
    if (result := main(*sys.argv[1:])) is not None:
        print_result(result)
