"""An engine whose workers live in other processes, patched by the plugin alone.

Usage: python -m tests.engine.programs.other_processes STARTS_ON PUSHED
Prints one JSON object: the digests before and after, the greedy tokens after with their
version, what a bad update raised, and what the death of the worker did.
"""

from __future__ import annotations

import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from tests.engine.programs.engine import OPTIONS, PROMPT, print_result
from tests.engine.programs.failing import fail_in_the_middle, raised_by
from tools.models import tiny_models


def in_one_buffer(weights: dict[str, Tensor]) -> Iterator[tuple[str, Tensor]]:
    """A trainer that gathers each tensor into the same memory."""
    buffer = torch.empty(max(t.nbytes for t in weights.values()), dtype=torch.uint8)
    for name, tensor in weights.items():
        yield name, buffer[: tensor.nbytes].view(tensor.dtype).view(tensor.shape).copy_(tensor)


def main(starts_on: str, pushed: str) -> dict[str, Any]:
    from vllm import LLM, SamplingParams

    llm = LLM(starts_on, **OPTIONS)
    # Not before: nothing but the environment told vLLM to load the plugin.
    import flashquant
    from tests.engine.serving import weight_version

    before = flashquant.status(llm)
    report = flashquant.reload_weights(llm, Path(pushed))
    sampling = SamplingParams(max_tokens=16, temperature=0, ignore_eos=True)
    answers = llm.generate([PROMPT], sampling, use_tqdm=False)
    result = {
        "before": before.digest,
        "report": report.digest,
        "after": flashquant.status(llm).digest,
        "tokens": list(answers[0].outputs[0].token_ids),
        "version": weight_version(llm, str(flashquant.status(llm).version)),
        "refused": raised_by(lambda: flashquant.reload_weights(llm, {"typo": torch.zeros(1)})),
    }
    flashquant.reload_weights(llm, Path(starts_on))
    flashquant.reload_weights(llm, in_one_buffer(tiny_models.tensors(Path(pushed))))
    result["by one buffer"] = flashquant.status(llm).digest
    weights = tiny_models.tensors(Path(starts_on))
    weights["zzz"] = weights.pop("model.norm.weight") * torch.nan  # sorted: the last one
    result["tore"] = raised_by(lambda: flashquant.reload_weights(llm, weights, atomic=False))
    result["torn"] = flashquant.status(llm).torn
    (refused,) = llm.generate([PROMPT], sampling, use_tqdm=False)
    result["said while torn"] = [refused.outputs[0].finish_reason, refused.outputs[0].token_ids]
    flashquant.reload_weights(llm, Path(pushed))
    (healed,) = llm.generate([PROMPT], sampling, use_tqdm=False)
    result["healed"] = list(healed.outputs[0].token_ids)
    llm.collective_rpc(fail_in_the_middle, kwargs={"rank": 0, "dies": True})
    lost = raised_by(lambda: flashquant.reload_weights(llm, Path(starts_on)))
    return {**result, "lost": lost}


if __name__ == "__main__":
    print_result(main(*sys.argv[1:]))
