"""Engines are shown an image before and after each of several updates.

Usage: python -m tests.engine.programs.seen A B SCHEME...
Prints one JSON object: by scheme, what `converse` returns without prefix caching, and with it.
"""

from __future__ import annotations

import os
import sys
from pathlib import Path
from typing import Any

import torch

from tests.engine import sights
from tests.engine.programs.engine import print_result
from tools.models import tiny_models


def main(a: str, b: str, *schemes: str) -> dict[str, Any]:
    return {scheme: [shown(a, b, scheme, caching) for caching in (0, 1)] for scheme in schemes}


def shown(a: str, b: str, scheme: str, caching: int) -> list[Any]:
    """Of an engine of its own, which ends with it."""
    from vllm import LLM

    os.environ["FLASHRL_CONFIG"] = scheme
    with sights.understood():
        llm = LLM(a, **sights.options(enable_prefix_caching=bool(caching)))
    told = converse(llm, Path(a), Path(b))
    # Time enough: vLLM looks for the children of what it has to kill, which may be gone by then.
    llm.llm_engine.engine_core.shutdown(timeout=60)
    return told


def converse(llm: Any, a: Path, b: Path) -> list[Any]:
    """What an engine that started on A says and holds: of A, B, A, B, A."""
    import flashquant

    told = [stands(llm)]
    for push in (
        lambda: flashquant.reload_weights(llm, b),
        lambda: flashquant.reload_weights(llm, sights.live(a)),
        lambda: one_a_call(llm, tiny_models.tensors(b)),
        lambda: one_a_call(llm, sights.live(a)),
    ):
        push()
        told.append(stands(llm))
    return told


def one_a_call(llm: Any, weights: dict[str, Any]) -> None:
    """As trainers do that call the worker for each tensor."""
    for name, tensor in weights.items():
        values = tensor.contiguous().view(torch.uint8).numpy().tobytes()  # vLLM sends no tensors
        llm.collective_rpc(_load, args=(name, list(tensor.shape), values))


def _load(worker: Any, name: str, shape: list[int], values: bytes) -> None:
    tensor = torch.frombuffer(bytearray(values), dtype=torch.bfloat16).view(shape)
    worker.get_model().load_weights([(name, tensor)])


def stands(llm: Any) -> list[Any]:
    """Its digest; what it says after words, and twice after the same image."""
    import flashquant

    asked = [sights.words(), sights.prompt(), sights.prompt()]
    return [flashquant.status(llm).digest, *(said(llm, prompt) for prompt in asked)]


def said(llm: Any, prompt: dict[str, Any]) -> list[list[float]]:
    """Greedy tokens with their log-probs, each prompt by itself."""
    from vllm import SamplingParams

    sampling = SamplingParams(
        max_tokens=6, temperature=0, ignore_eos=True, logprobs=0, detokenize=False
    )
    (answer,) = llm.generate([prompt], sampling, use_tqdm=False)
    output = answer.outputs[0]
    steps = zip(output.token_ids, output.logprobs, strict=True)
    return [[token, step[token].logprob] for token, step in steps]


if __name__ == "__main__":
    print_result(main(*sys.argv[1:]))
