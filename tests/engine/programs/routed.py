"""What an engine generates, says of it, and which experts it chose: vLLM's second model runner.

That runner's kernels are Triton's, and run in Triton's interpreter here (TRITON_INTERPRET=1).

Usage: python -m tests.engine.programs.routed MOE DENSE
Prints one JSON object: by the name of the model a list of answers, each with prompt, tokens, their
log-probs and, of the mixture of experts, `[tokens, layers, K]`.
"""

from __future__ import annotations

import sys
from importlib import metadata
from types import SimpleNamespace
from typing import Any

import torch
from triton.backends import backends

from tests.engine.programs.engine import OPTIONS, print_result

# As in `second_runner`, which says why.
_version = metadata.version
metadata.version = lambda name: "cpu" if name == "vllm" else _version(name)
backends["cpu"] = SimpleNamespace(driver=SimpleNamespace(is_active=lambda: True), compiler=None)


def main(moe: str, dense: str) -> dict[str, Any]:
    import flashquant

    flashquant.patch()
    engines = [started(moe, enable_return_routed_experts=True), started(dense)]
    return dict(zip(("moe", "dense"), map(answers, engines), strict=True))


def started(model: str, **options: Any) -> Any:
    from vllm import LLM

    return LLM(model, **OPTIONS | options)


def answers(llm: Any) -> list[dict[str, Any]]:
    from vllm import SamplingParams

    dice = torch.Generator().manual_seed(0)
    prompts = torch.randint(5, 900, (8, 60), generator=dice).tolist()
    how = SamplingParams(max_tokens=24, temperature=1.0, ignore_eos=True, logprobs=0)
    asked = [{"prompt_token_ids": prompt} for prompt in prompts]
    return [answer(said) for said in llm.generate(asked, how, use_tqdm=False)]


def answer(said: Any) -> dict[str, Any]:
    (output,) = said.outputs
    steps = zip(output.token_ids, output.logprobs, strict=True)
    routed = output.routed_experts
    return {
        "prompt": said.prompt_token_ids,
        "tokens": list(output.token_ids),
        "logprobs": [step[token].logprob for token, step in steps],
        "routed": None if routed is None else routed.tolist(),
    }


if __name__ == "__main__":
    print_result(main(*sys.argv[1:]))
