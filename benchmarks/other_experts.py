"""What the experts of another rank cost a rank: their names, or more?

    FLASHRL_CONFIG=bf16 python -m benchmarks.other_experts [--experts 128]

Two ranks of a tiny Qwen3-MoE each have half of its experts (expert parallelism). They are pushed
those that they have, and those that they have not, a tensor a call; microseconds a tensor, medians
of the slower rank. A copy of the same tensors is the yardstick.
"""

from __future__ import annotations

import argparse
import os
import statistics
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from transformers import AutoModelForCausalLM, Qwen3MoeConfig

from tools.architectures.shapes import shaped
from tools.models import tiny_models

_ROUNDS = 7

console = Console()


class Measured:
    """Methods of a worker (`worker_extension_cls`)."""

    def time_experts(self: Any, path: str) -> dict[str, float]:
        """Seconds a tensor of each kind; half an update is not left behind."""
        from flashquant.patches.seams.loading import session_of

        session = session_of(self.get_model())
        weights = {n: t for n, t in tiny_models.tensors(Path(path)).items() if ".experts." in n}
        session.begin()
        session.push(list(weights.items()))
        session.abandon()
        mine = {name: t for name, t in weights.items() if session.plan[name].steps}
        others = {name: t for name, t in weights.items() if name not in mine}
        copies = {name: tensor.clone() for name, tensor in mine.items()}

        def push(some: dict[str, Any]) -> None:
            for pair in some.items():
                session.push([pair])

        def copy(some: dict[str, Any]) -> None:
            for name, tensor in some.items():
                copies[name].copy_(tensor)

        session.begin()
        try:
            push(mine)
        finally:
            session.abandon()
        return {
            "its own": _seconds(session, push, mine),
            "another rank's": _seconds(session, push, others),
            "copy": _seconds(session, copy, mine),
            "held": float(len(mine)),
            "of": float(len(weights)),
        }


def _seconds(session: Any, call: Callable[[dict[str, Any]], None], some: dict[str, Any]) -> float:
    times = []
    for _ in range(_ROUNDS):
        session.begin()
        start = time.perf_counter()
        call(some)
        times.append(time.perf_counter() - start)
        session.abandon()
    return statistics.median(times) / len(some)


def main() -> None:
    """Start one engine, and print a line a kind."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.other_experts", description=__doc__)
    parser.add_argument("--experts", type=int, default=128)
    experts = parser.parse_args().experts
    with tempfile.TemporaryDirectory() as folder:
        ranks = _ask_ranks(_checkpoint(Path(folder), experts))
    worst = {key: max(rank[key] for rank in ranks) for key in ranks[0]}
    console.print(f"{worst['held']:.0f} of {worst['of']:.0f} tensors of experts are a rank's own")
    for key in ("its own", "another rank's", "copy"):
        console.print(f"{key:<15} {worst[key] * 1e6:7.1f} us a tensor")


def _checkpoint(path: Path, experts: int) -> str:
    """Of a mixture with so many experts, as wide as the other tiny models."""
    config = shaped(
        Qwen3MoeConfig,
        num_experts=experts,
        num_experts_per_tok=8,
        moe_intermediate_size=128,
        decoder_sparse_step=1,
        mlp_only_layers=[],
    )
    model = AutoModelForCausalLM.from_config(config, dtype=torch.bfloat16)
    model.save_pretrained(path)
    return str(path)


def _ask_ranks(path: str) -> list[dict[str, float]]:
    os.environ.setdefault("VLLM_CPU_OMP_THREADS_BIND", "0|1")
    from vllm import LLM

    llm = LLM(
        path,
        skip_tokenizer_init=True,
        enforce_eager=True,
        kv_cache_memory_bytes=16 << 20,
        max_model_len=128,
        dtype="bfloat16",
        tensor_parallel_size=2,
        enable_expert_parallel=True,
        worker_extension_cls="benchmarks.other_experts.Measured",
    )
    ranks: list[dict[str, float]] = llm.collective_rpc("time_experts", args=(path,))
    return ranks


if __name__ == "__main__":
    main()
