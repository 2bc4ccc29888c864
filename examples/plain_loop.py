"""A loop of your own: sample in int8, step in float32, push, and again.

    FLASHRL_CONFIG=int8 python -m examples.plain_loop

REINFORCE on SmolLM2 (the reward: fewer letters), without a stack around it. flashquant's are the
variable above, `reload_weights`, and the weights of the loss.
"""

from __future__ import annotations

import argparse
from typing import Any

import torch
from rich.console import Console
from torch import Tensor
from transformers import AutoModelForCausalLM, PreTrainedModel
from vllm import LLM, SamplingParams

import flashquant
from examples.demo import smollm2
from examples.demo.outcome import PROMPTS
from flashquant import tis


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m examples.plain_loop", description=__doc__)
    parser.add_argument("--model", help="a checkpoint; SmolLM2-135M where none is named")
    parser.add_argument("--steps", type=int, default=3)
    arguments = parser.parse_args()
    checkpoint = arguments.model or str(smollm2.checkpoint(smollm2.default_cache_dir()))
    model = AutoModelForCausalLM.from_pretrained(checkpoint, dtype=torch.float32)
    loop(model, engine(checkpoint), arguments.steps, Console())


def engine(checkpoint: str) -> LLM:
    return LLM(
        checkpoint,
        dtype="bfloat16",  # of everything that is not quantized
        enforce_eager=True,
        max_model_len=128,
        max_num_seqs=16,
        kv_cache_memory_bytes=64 << 20,
    )


def loop(model: PreTrainedModel, llm: LLM, steps: int, console: Console) -> None:
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-5)
    sampling = SamplingParams(n=4, temperature=1.0, max_tokens=16, logprobs=0)
    for step in range(1, steps + 1):
        requests = llm.generate(list(PROMPTS), sampling, use_tqdm=False)
        for request in requests:
            learn(model, request)
        optimizer.step()
        optimizer.zero_grad()
        # Every parameter, once; a tied head has no tensor of its own.
        report = flashquant.reload_weights(llm, dict(model.named_parameters()))
        lengths = [len(output.text) for request in requests for output in request.outputs]
        console.print(f"step {step}: {sum(lengths) / len(lengths):.1f} letters; {report}")


def learn(model: PreTrainedModel, request: Any) -> None:
    """Gradients from one prompt's answers, each compared with the others."""
    rewards = torch.tensor([-len(output.text) / 100 for output in request.outputs])
    for output, advantage in zip(request.outputs, rewards - rewards.mean(), strict=True):
        tokens = torch.tensor([[*request.prompt_token_ids, *output.token_ids]])
        answer = len(request.prompt_token_ids)
        predictions = model(input_ids=tokens).logits[0, answer - 1 : -1].log_softmax(-1)
        logprobs = predictions.gather(1, tokens[0, answer:, None]).squeeze(1)
        rollout = rollout_logprobs(output)
        mask = torch.ones_like(rollout[None], dtype=torch.bool)  # no tool has spoken
        weights = tis.truncated_importance_weights(logprobs[None], rollout[None], mask).weights[0]
        (-(weights * advantage * logprobs).mean()).backward()


def rollout_logprobs(output: Any) -> Tensor:
    steps = zip(output.token_ids, output.logprobs, strict=True)
    return torch.tensor([logprobs[token].logprob for token, logprobs in steps])


if __name__ == "__main__":
    main()
