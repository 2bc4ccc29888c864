"""Two steps of TRL's GRPO on the example's settings, and fresh engines on what they made.

Usage: python -m tests.stacks.programs.trl_grpo MODEL DTYPE OUTPUT

All of it is TRL's: trainer, engine, generation, `sync_weights`. Nothing is replaced; only the
device is a CPU, which TRL has a setting for.
"""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

import torch

from examples import trl_grpo
from tests.stacks.programs.rollouts import print_result, raised_by, said


def main(model: str, dtype: str, output: str) -> dict[str, Any]:
    import flashquant

    arguments = trl_grpo.config(output, steps=2)
    arguments.model_init_kwargs = {"dtype": dtype}
    trainer = trl_grpo.trainer(model, arguments)
    rollout = trainer.vllm_generation
    result: dict[str, Any] = {"started": said(rollout.llm), "generated with": []}
    generate = rollout.generate

    def noting(*args: Any, **kwargs: Any) -> Any:
        result["generated with"].append(flashquant.status(rollout.llm).digest)
        return generate(*args, **kwargs)

    rollout.generate = noting
    trainer.train()
    result["after two steps"] = said(rollout.llm)
    rollout.sync_weights()
    result["synced"] = said(rollout.llm)
    result["refused"] = _refused(trainer)
    result["after refusal"] = said(rollout.llm)
    rollout.sync_weights()
    result["synced again"] = said(rollout.llm)
    result["gradients"] = [log["grad_norm"] for log in trainer.state.log_history if "loss" in log]
    for step in (1, 2):
        fresh = _started_like(trainer, Path(output) / f"checkpoint-{step}")
        result[f"fresh on step {step}"] = said(fresh)
        _KEPT.append(fresh)  # vLLM takes the others down with the first that is collected
    return result


def _refused(trainer: Any) -> list[str]:
    """What TRL's own sync does with a policy that holds NaN; the policy is put right again."""
    weight = trainer.model.model.norm.weight
    before = weight.detach().clone()
    with torch.no_grad():
        weight[0] = torch.nan
    raised = raised_by(trainer.vllm_generation.sync_weights)
    with torch.no_grad():
        weight.copy_(before)
    return raised


_KEPT: list[Any] = []


def _started_like(trainer: Any, checkpoint: Path) -> Any:
    """An engine with every setting that TRL gave its own, on another checkpoint.

    But for the dtype: a float32 trainer saves float32, and its engine is a bf16 one.
    """
    from vllm import LLM

    rollout = trainer.vllm_generation
    return LLM(
        str(checkpoint),
        dtype="bfloat16",
        tensor_parallel_size=1,
        gpu_memory_utilization=rollout.gpu_memory_utilization,
        max_model_len=rollout.max_model_length,
        max_num_seqs=rollout.max_num_seqs,
        model_impl=rollout.model_impl,
        distributed_executor_backend="external_launcher",
        seed=0,
        max_num_batched_tokens=4096,
        logprobs_mode="processed_logprobs",
    )


if __name__ == "__main__":
    print_result(main(*sys.argv[1:]))
