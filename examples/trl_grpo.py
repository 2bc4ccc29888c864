"""GRPO with TRL: the trainer in full precision, rollouts from a colocated vLLM in int8.

    FLASHRL_CONFIG=int8 python -m examples.trl_grpo
    FLASHRL_CONFIG=int8 python -m examples.trl_grpo --model Qwen/Qwen3-0.6B --steps 100

Nothing of flashquant is imported: TRL starts vLLM, vLLM finds the plugin, and TRL's own
`sync_weights` then writes int8 in place. The settings are those of TRL 1.16.0.
"""

from __future__ import annotations

import argparse

import torch
from datasets import Dataset
from trl import GRPOConfig, GRPOTrainer

from examples.demo import smollm2
from examples.demo.outcome import PROMPTS


def config(output_dir: str, steps: int) -> GRPOConfig:
    """What matters for quantized rollouts, and then what keeps a run on a CPU short."""
    on_gpu = torch.cuda.is_available()
    return GRPOConfig(
        output_dir=output_dir,
        use_vllm=True,
        # In `server` mode set FLASHRL_CONFIG where the server is started; the rest is the same.
        vllm_mode="colocate",
        # int8 rollouts are a little off the trainer's policy: weigh each token by
        # min(pi_trainer / pi_rollout, 2). TRL asks vLLM for `processed_logprobs` by itself.
        vllm_importance_sampling_correction=True,
        vllm_importance_sampling_mode="token_truncate",
        vllm_importance_sampling_clip_max=2.0,
        use_cpu=not on_gpu,
        bf16=on_gpu,
        learning_rate=1e-4,
        max_steps=steps,
        per_device_train_batch_size=4,
        num_generations=4,
        max_completion_length=16,
        vllm_max_model_length=128,
        save_steps=1,
        save_only_model=True,
        logging_steps=1,
        report_to=[],
    )


def brevity(completions: list[str], **_: object) -> list[float]:
    """The reward: fewer letters."""
    return [-len(completion) / 100 for completion in completions]


def trainer(model: str, arguments: GRPOConfig) -> GRPOTrainer:
    prompts = Dataset.from_list([{"prompt": prompt} for prompt in PROMPTS * 8])
    return GRPOTrainer(model, reward_funcs=brevity, args=arguments, train_dataset=prompts)


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m examples.trl_grpo", description=__doc__)
    parser.add_argument("--model", help="a checkpoint; SmolLM2-135M where none is named")
    parser.add_argument("--steps", type=int, default=2)
    parser.add_argument("--output", default="trl-grpo")
    arguments = parser.parse_args()
    model = arguments.model or str(smollm2.checkpoint(smollm2.default_cache_dir()))
    trainer(model, config(arguments.output, arguments.steps)).train()


if __name__ == "__main__":
    main()
