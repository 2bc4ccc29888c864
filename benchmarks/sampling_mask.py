"""What does top-p cost a ratio of policies, and what does `tis.masked_logprobs` cost?

    python -m benchmarks.sampling_mask [--tokens 24] [--docs] [--json FILE]
    python -m benchmarks.sampling_mask --memory [--docs]

The bias: SmolLM2-135M answers 16 prompts in a bf16 engine with top_p 0.9 and top_k 50; a trainer
with the very same weights computes the log-probs of those answers three times: over the whole
vocabulary, over the tokens that vLLM says it kept (`return_sampling_mask`, its second model runner,
whose kernels Triton interprets here), and over those that `tis.Truncation` says it kept. Every
ratio should be 1.

The memory: forward and backward at B=4, T=2048, V=151,936 in bf16, how far the process's high-water
mark (VmHWM) rose above the logits themselves, which are 2.5 GB, and so is their gradient.

`--docs` writes the tables into docs/loss-correction.md.
"""

from __future__ import annotations

import argparse
import os
import re
import time
from collections.abc import Mapping
from dataclasses import dataclass
from importlib import metadata
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import torch
from torch import Tensor

from benchmarks import results
from flashquant import tis

PAGE = Path(__file__).parents[1] / "docs" / "loss-correction.md"
TOP_P, TOP_K = 0.9, 50
SHAPE = (4, 2048, 151_936)
_PROMPTS = (
    "Write a short story about a lighthouse keeper.",
    "Explain why the sky is blue.",
    "What should I cook with rice and eggs?",
    "Describe a walk through a forest in autumn.",
    "How does a bicycle stay upright?",
    "Give me three ideas for a birthday present.",
    "What is the difference between weather and climate?",
    "Tell me about the history of bread.",
    "Why do cats purr?",
    "Write a letter to a friend who has moved away.",
    "How do I learn to play the guitar?",
    "What makes a good teacher?",
    "Explain photosynthesis to a child.",
    "Describe your favourite kind of music.",
    "How are bridges built?",
    "What would you take to a desert island?",
)


@dataclass(frozen=True)
class Bias:
    """How far the trainer's log-probs are from the rollout's, of the same weights; nats.

    Attributes:
        mean: of log pi_trainer - log pi_rollout over tokens.
        size: of its absolute value.
        sequence: the mean log ratio of a whole answer.
        ess: effective sample size of the ratios of whole answers.

    """

    mean: float
    size: float
    sequence: float
    ess: float


def main() -> int:
    """One table, and where it goes."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--memory", action="store_true", help="the memory, not the bias")
    parser.add_argument("--tokens", type=int, default=24, help="of each answer")
    parser.add_argument("--docs", action="store_true", help="write docs/loss-correction.md")
    parser.add_argument("--json", type=Path)
    chosen = parser.parse_args()
    name = "sampling-memory" if chosen.memory else "sampling-bias"
    found = memory() if chosen.memory else biases(chosen.tokens)
    table = memory_table(found) if chosen.memory else bias_table(found)
    print(table)
    if chosen.docs:
        _write(name, table)
    if chosen.json:
        results.save_json(found, results.machine(), chosen.json)
    return 0


def biases(count: int) -> dict[str, Bias]:
    """Of each way to compute the trainer's log-probs."""
    from examples.demo import smollm2

    path = smollm2.checkpoint(smollm2.default_cache_dir())
    answers = sampled(path, count)
    rollout = torch.tensor([answer.logprobs for answer in answers])
    tokens = torch.tensor([answer.tokens for answer in answers])
    logits = trainers_logits(path, answers)
    kept = {
        "the whole vocabulary": tis.Truncation(),
        "kept as vLLM says (`sampling_mask`)": [answer.kept for answer in answers],
        "kept as `tis.Truncation` says": tis.Truncation(top_k=TOP_K, top_p=TOP_P),
    }
    return {
        name: compared(tis.masked_logprobs(logits, tokens, cut), rollout)
        for name, cut in kept.items()
    }


def compared(trainer: Tensor, rollout: Tensor) -> Bias:
    log_ratio = trainer - rollout
    _, _, metrics = tis.Correction(level="sequence", cap=None)(
        trainer, rollout, torch.ones_like(rollout)
    )
    return Bias(
        mean=log_ratio.mean().item(),
        size=log_ratio.abs().mean().item(),
        sequence=log_ratio.sum(-1).mean().item(),
        ess=metrics.ess.item(),
    )


@dataclass(frozen=True)
class Answer:
    """What the engine said; log-probs over the tokens that it kept."""

    prompt: list[int]
    tokens: list[int]
    logprobs: list[float]
    kept: list[list[int]]


def sampled(path: Path, count: int) -> list[Answer]:
    """By vLLM's second model runner, which returns what the sampler kept."""
    _let_triton_interpret()
    from transformers import AutoTokenizer
    from vllm import LLM, SamplingParams
    from vllm.v1.sample.ops import topk_topp_sampler

    import flashquant

    # vLLM cuts in Triton where it has it, and the interpreter cannot run that kernel. So it is
    # vLLM's other one, in torch, which a CPU has; what it kept is collected as on a GPU.
    topk_topp_sampler.HAS_TRITON = False

    flashquant.patch()
    llm = LLM(
        str(path),
        enforce_eager=True,
        kv_cache_memory_bytes=64 << 20,
        max_model_len=256,
        dtype="bfloat16",
        return_sampling_mask=True,
    )
    tokenizer = AutoTokenizer.from_pretrained(path)
    asked = [{"prompt_token_ids": tokenizer(f"{text}\n\n").input_ids} for text in _PROMPTS]
    how = SamplingParams(
        temperature=1.0, top_p=TOP_P, top_k=TOP_K, max_tokens=count, ignore_eos=True, logprobs=0
    )
    return [_answer(said) for said in llm.generate(asked, how, use_tqdm=False)]


def _answer(said: Any) -> Answer:
    (output,) = said.outputs
    tokens = list(output.token_ids)
    steps = zip(tokens, output.logprobs, strict=True)
    return Answer(
        prompt=list(said.prompt_token_ids),
        tokens=tokens,
        logprobs=[step[token].logprob for token, step in steps],
        kept=output.sampling_mask.token_ids,
    )


def _let_triton_interpret() -> None:
    """Environment and names that vLLM's second runner wants on a CPU."""
    from benchmarks import environment

    environment.prepare()
    os.environ.update(
        FLASHRL_CONFIG="bf16",
        FLASHRL_LMHEAD_FP32="1",
        TRITON_INTERPRET="1",
        VLLM_USE_V2_MODEL_RUNNER="1",
    )
    from triton.backends import backends

    version = metadata.version
    metadata.version = lambda name: "cpu" if name == "vllm" else version(name)
    backends["cpu"] = SimpleNamespace(driver=SimpleNamespace(is_active=lambda: True), compiler=None)


def trainers_logits(path: Path, answers: list[Answer]) -> Tensor:
    """`[answers, tokens, V]`, of the same weights, in bf16 with a float32 head."""
    from transformers import LlamaForCausalLM

    model = LlamaForCausalLM.from_pretrained(path, dtype=torch.bfloat16).eval()
    rows = []
    with torch.no_grad():
        for answer in answers:
            ids = torch.tensor([answer.prompt + answer.tokens])
            hidden = model.model(input_ids=ids).last_hidden_state[0]
            after = hidden[len(answer.prompt) - 1 : -1].float()
            rows.append(after @ model.lm_head.weight.float().T)
    return torch.stack(rows)


def memory() -> dict[str, dict[str, float]]:
    """GB over the logits, and seconds, of each kind of `kept`."""
    rows, columns, size = SHAPE
    dice = torch.Generator().manual_seed(0)
    logits = torch.empty(SHAPE, dtype=torch.bfloat16).normal_(generator=dice).requires_grad_()
    tokens = torch.randint(size, (rows, columns), generator=dice)
    others = torch.randint(size, (rows, columns, TOP_K - 1), generator=dice)
    lists = torch.cat([tokens.unsqueeze(-1), others], -1).tolist()
    cuts = {
        f"lists of {TOP_K}": lists,
        f"`Truncation(top_k={TOP_K}, top_p={TOP_P})`": tis.Truncation(top_k=TOP_K, top_p=TOP_P),
    }
    return {name: _measured(logits, tokens, cut) for name, cut in cuts.items()}


def _measured(logits: Tensor, tokens: Tensor, cut: Any) -> dict[str, float]:
    logits.grad = None
    Path("/proc/self/clear_refs").write_text("5")
    before, began = _status("VmRSS"), time.perf_counter()
    tis.masked_logprobs(logits, tokens, cut).mean().backward()
    rose, seconds = _status("VmHWM") - before, time.perf_counter() - began
    return {
        "rose": rose / 1e9,
        "logits": logits.nbytes / 1e9,
        "ratio": rose / logits.nbytes,
        "seconds": seconds,
    }


def _status(field: str) -> int:
    text = Path("/proc/self/status").read_text()
    found = re.search(rf"^{field}:\s+(\d+) kB$", text, re.MULTILINE)
    assert found is not None
    return int(found[1]) * 1024


def bias_table(found: Mapping[str, Bias]) -> str:
    rows = [
        [name, f"{b.mean:+.4f}", f"{b.size:.4f}", f"{b.sequence:+.2f}", f"{b.ess:.2f}"]
        for name, b in found.items()
    ]
    titles = ["trainer's log-probs over", "mean log ratio", "mean size", "of an answer", "ESS"]
    return results.markdown(titles, rows)


def memory_table(found: Mapping[str, Mapping[str, float]]) -> str:
    rows = [[name, f"{m['rose']:.2f} GB", f"{m['ratio']:.2f}"] for name, m in found.items()]
    titles = ["kept", "peak over the logits", "of one logits tensor"]
    return results.markdown(titles, rows)


def _write(name: str, table: str) -> None:
    """Between the marks of that name."""
    begin, end = f"<!-- {name}: begin -->", f"<!-- {name}: end -->"
    before, found, rest = PAGE.read_text().partition(begin)
    _, closed, after = rest.partition(end)
    if not (found and closed):
        raise SystemExit(f"{PAGE} has no marks {begin} ... {end}")
    PAGE.write_text(f"{before}{begin}\n\n{table}\n\n{end}{after}")


if __name__ == "__main__":
    raise SystemExit(main())
