"""Compiled engines (enforce_eager=False): one reloaded, one started on the same weights.

Usage: python -m tests.engine.programs.compiled STARTS_ON PUSHED
Prints one JSON object: tokens and log-probs of both, and of the first before the push.
"""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

from vllm import LLM, SamplingParams

import flashquant
from tests.engine.programs.engine import OPTIONS, PROMPT, print_result

# Few, and few at a time: compiled fp8 is oneDNN's on a CPU with AMX (tests/support/fp8.py), and
# vLLM warms up with as many tokens as there may be.
TOKENS = 4
FEW = {"max_num_batched_tokens": 128, "max_num_seqs": 4}


def engine(checkpoint: str) -> Any:
    options = {**OPTIONS, "enforce_eager": False, **FEW, "enable_prefix_caching": False}
    return LLM(checkpoint, **options)


def says(llm: Any) -> list[Any]:
    sampling = SamplingParams(max_tokens=TOKENS, temperature=0, ignore_eos=True, logprobs=0)
    (answer,) = llm.generate([PROMPT], sampling, use_tqdm=False)
    output = answer.outputs[0]
    return [
        [token, step[token].logprob]
        for token, step in zip(output.token_ids, output.logprobs, strict=True)
    ]


def main(starts_on: str, pushed: str) -> dict[str, Any]:
    live = engine(starts_on)
    before = says(live)
    flashquant.reload_weights(live, Path(pushed))
    fresh = engine(pushed)
    same = flashquant.status(live).digest == flashquant.status(fresh).digest
    return {"before": before, "reloaded": says(live), "fresh": says(fresh), "digests": same}


if __name__ == "__main__":
    print_result(main(*sys.argv[1:]))
