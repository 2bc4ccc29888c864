"""The rollout side: a live vLLM in one scheme, pushed to after every step."""

from __future__ import annotations

import os
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from examples.rl import task
from examples.rl.task import Problem

# What makes a small CPU engine start fast, stay in this process, and leave the cores alone.
ENGINE_ENVIRONMENT = {
    "FLASHRL_LOGGING_LEVEL": "WARNING",
    "HF_HUB_OFFLINE": "1",
    "OMP_NUM_THREADS": "1",
    "OMP_WAIT_POLICY": "passive",
    "TORCHDYNAMO_DISABLE": "1",
    "VLLM_CPU_OMP_THREADS_BIND": "nobind",
    "VLLM_ENABLE_V1_MULTIPROCESSING": "0",
    "VLLM_LOGGING_LEVEL": "ERROR",
}
# Overrides `kv_cache_memory_bytes`, and crashes vLLM when it is set but empty.
ENGINE_FORBIDDEN = "VLLM_CPU_KVCACHE_SPACE"

_MAX_LENGTH = 64


@dataclass
class Episode:
    """One answer: all tokens after the prompt, and which of them the policy chose.

    Attributes:
        problem: what was asked.
        tokens: everything after the prompt, the calculator's answers included.
        chosen: True on the policy's own tokens.
        logprobs: as vLLM returned them; 0 on tokens that nobody sampled.
        ended: the full stop was written, or there was no room for it.

    """

    problem: Problem
    tokens: list[int] = field(default_factory=list)
    chosen: list[bool] = field(default_factory=list)
    logprobs: list[float] = field(default_factory=list)
    ended: bool = False

    @property
    def reward(self) -> float:
        return task.reward(self.problem, self.tokens, self.chosen)

    @property
    def own_length(self) -> int:
        """Characters of the answer so far: without calls and what they brought."""
        own = zip(self.tokens, self.chosen, strict=True)
        return sum(chosen and token != task.CALL for token, chosen in own)

    def wrote(self, tokens: list[int], logprobs: list[float]) -> None:
        """The policy's own tokens."""
        self.tokens += tokens
        self.logprobs += logprobs
        self.chosen += [True] * len(tokens)

    def was_told(self, text: str) -> None:
        """The calculator's answer: read by the policy, and masked in its loss."""
        told = task.encode(text)
        self.tokens += told
        self.logprobs += [0.0] * len(told)
        self.chosen += [False] * len(told)


class Engine:
    """One live vLLM; arms and seeds of one scheme share it, since a push replaces every weight."""

    def __init__(self, scheme: str, checkpoint: Path, *, seats: int = 256) -> None:
        os.environ["FLASHRL_CONFIG"] = scheme
        from vllm import LLM

        import flashquant

        # The plugin has done it where flashquant is installed; from a bare checkout it has not.
        flashquant.patch()
        self.scheme = scheme
        self.llm = LLM(
            str(checkpoint),
            dtype="bfloat16",
            skip_tokenizer_init=True,
            enable_prefix_caching=False,
            enforce_eager=True,
            max_model_len=_MAX_LENGTH,
            max_num_seqs=seats,
            kv_cache_memory_bytes=128 << 20,
            disable_log_stats=True,
        )
        torch.set_num_threads(1)  # vLLM sets its own; the trainer is in this process too

    def push(self, weights: dict[str, Tensor]) -> Any:
        """Replace every weight in place; flashquant's report."""
        import flashquant

        return flashquant.reload_weights(self.llm, weights)

    def play(
        self,
        asked: list[Problem],
        group: int,
        *,
        seed: int,
        calculator: bool = False,
        top_p: float = 1.0,
    ) -> list[Episode]:
        """`group` sampled answers to each problem, neighbours in the list.

        The engine lives in this process and draws from torch's own generator, so one seed a step
        makes rollouts repeatable, and a resumed run equal to one that was never interrupted.
        """
        torch.manual_seed(seed)
        episodes = [Episode(problem) for problem in asked for _ in range(group)]
        for _ in range(1 + calculator * task.DIGITS):
            open_ones = [episode for episode in episodes if not episode.ended]
            if not open_ones:
                break
            self._turn(open_ones, calculator, top_p)
        return episodes

    def _turn(self, episodes: list[Episode], calculator: bool, top_p: float) -> None:
        """Let each policy write until it ends, calls, or has filled its room."""
        from vllm import SamplingParams

        requests, samplings = [], []
        for episode in episodes:
            ids = task.encode(episode.problem.prompt) + episode.tokens
            requests.append({"prompt_token_ids": ids})
            samplings.append(
                SamplingParams(
                    temperature=1.0,
                    top_p=top_p,
                    max_tokens=task.ANSWER_LENGTH - episode.own_length + calculator,
                    logprobs=0,
                    detokenize=False,
                    stop_token_ids=[task.END, task.CALL] if calculator else [task.END],
                )
            )
        answers = self.llm.generate(requests, samplings, use_tqdm=False)
        for episode, answer in zip(episodes, answers, strict=True):
            output = answer.outputs[0]
            tokens = list(output.token_ids)
            episode.wrote(tokens, sampled_logprobs(output))
            may_call = calculator and episode.own_length < task.DIGITS
            if may_call and tokens[-1] == task.CALL:
                episode.was_told(episode.problem.column(episode.own_length))
            else:
                episode.ended = True


def sampled_logprobs(output: Any) -> list[float]:
    """The log-prob of each token that was sampled."""
    steps = zip(output.token_ids, output.logprobs, strict=True)
    return [step[token].logprob for token, step in steps]
