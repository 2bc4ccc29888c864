"""vLLM as it is, or with flashquant: what the comparisons of the two have in common.

An arm is a process of its own, because being patched is a property of a process. What its
engines serve is compared exactly, by prompt log-probs and greedy tokens: a mean or a KL does
not tell a stale 8-bit engine from an updated one.
"""

from __future__ import annotations

import math
import os
import shutil
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from unittest import mock

import torch
from safetensors.torch import save_file
from torch import Tensor

NATIVE, FLASHQUANT = ARMS = ("native", "flashquant")
ROOT = Path(__file__).parents[1]

# Short: fp8 takes 55 ns a product on a CPU with AMX (docs/schemes.md).
_PROMPTS = [list(range(5 + shift, 13 + shift)) for shift in (0, 3, 11, 200)]
_ENVIRONMENT = {
    "HF_HUB_OFFLINE": "1",
    "OMP_NUM_THREADS": "1",  # tiny layers: a second thread costs more than it brings
    "TORCHDYNAMO_DISABLE": "1",
    "VLLM_CPU_OMP_THREADS_BIND": "nobind",
    "VLLM_ENABLE_V1_MULTIPROCESSING": "0",
    "VLLM_LOGGING_LEVEL": "ERROR",
}


@dataclass(frozen=True)
class Outputs:
    """What an engine says, to the last bit."""

    tokens: list[list[int]]
    logprobs: list[float]

    def gap(self, other: Outputs) -> float:
        """Largest difference of two prompt log-probs; NaN where either is."""
        pair = torch.tensor([self.logprobs, other.logprobs], dtype=torch.float64)
        return (pair[0] - pair[1]).abs().max().item()


def environment() -> dict[str, str]:
    """This process's, with everything decided that an arm must not inherit."""
    # VLLM_CPU_KVCACHE_SPACE would override kv_cache_memory_bytes.
    inherited = {
        name: value
        for name, value in os.environ.items()
        if name not in ("FLASHRL_CONFIG", "VLLM_CPU_KVCACHE_SPACE")
    }
    return inherited | _ENVIRONMENT


def enable_amx() -> None:
    """Ask for the tiles, as flashquant's plugin does; without them an attention dies of SIGILL."""
    if torch.cpu._is_amx_tile_supported():
        torch.cpu._init_amx()


def start(checkpoint: Path, config: str | None, **options: Any) -> Any:
    """An engine as a user starts it; the plugin finds FLASHRL_CONFIG, or nothing."""
    from vllm import LLM

    with mock.patch.dict(os.environ, {"FLASHRL_CONFIG": config} if config else {}):
        return LLM(
            str(checkpoint),
            skip_tokenizer_init=True,
            enforce_eager=True,
            kv_cache_memory_bytes=16 << 20,
            max_model_len=128,
            dtype="bfloat16",
            enable_prefix_caching=False,
            **options,
        )


def push(llm: Any, weights: Iterable[tuple[str, Tensor]]) -> str | None:
    """vLLM's own call; the name of what it raised."""
    return attempt(llm.collective_rpc, "reload_weights", kwargs={"weights_iterator": iter(weights)})


def attempt(call: Callable[..., object], *args: Any, **kwargs: Any) -> str | None:
    """Make a call; the name of what it raised."""
    try:
        call(*args, **kwargs)
    except Exception as error:
        return type(error).__name__
    return None


def outputs(llm: Any) -> Outputs:
    """8 greedy tokens for each of 4 prompts, and every prompt log-prob."""
    from vllm import SamplingParams

    sampling = SamplingParams(max_tokens=8, temperature=0, ignore_eos=True, prompt_logprobs=0)
    prompts = [{"prompt_token_ids": tokens} for tokens in _PROMPTS]
    answers = llm.generate(prompts, sampling, use_tqdm=False)
    return Outputs(
        tokens=[list(answer.outputs[0].token_ids) for answer in answers],
        logprobs=[
            row[token].logprob
            for answer in answers
            for token, row in zip(
                answer.prompt_token_ids[1:], answer.prompt_logprobs[1:], strict=True
            )
        ],
    )


def check_distinct(name: str, expected: Outputs, old: Outputs) -> None:
    """Two policies that say the same could not tell an update from none."""
    if expected == old or not math.isfinite(expected.gap(old)):
        raise AssertionError(f"{name}: these two policies prove nothing")


def silently_wrong(gap: float) -> str:
    """The verdict on a call that returned, and an engine that serves something else."""
    return f"silently wrong (max |Δ log-prob| {'NaN' if math.isnan(gap) else f'{gap:.3g}'})"


def write_like(source: Path, path: Path, weights: Mapping[str, Tensor]) -> Path:
    """Write a checkpoint of the same model with other weights."""
    path.mkdir()
    shutil.copy(source / "config.json", path)
    save_file(dict(weights), path / "model.safetensors", metadata={"format": "pt"})
    return path


def table(titles: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
    """The rows in markdown."""
    lines = [titles, ["---"] * len(titles), *rows]
    escaped = ([cell.replace("|", "\\|") for cell in cells] for cells in lines)
    return "\n".join(f"| {' | '.join(cells)} |" for cells in escaped)
