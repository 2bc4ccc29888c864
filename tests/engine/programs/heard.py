"""One engine is asked about the same sound before, during and after an update.

Usage: python -m tests.engine.programs.heard STARTS_ON PUSHED HOW
`HOW` is flashquant (its own call) or rpc (vLLM's reload_weights, by path).
Prints one JSON object: what was said, each token with its log-prob.
"""

from __future__ import annotations

import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from tests.engine import sounds
from tests.engine.programs.engine import print_result

IN_FLIGHT, CUT = 200, 4  # tokens of an answer, and how many of them come before the update


def main(starts_on: str, pushed: str, how: str) -> dict[str, Any]:
    from vllm import LLM

    return converse(LLM(starts_on, **sounds.OPTIONS), Path(pushed), how)


def converse(llm: Any, pushed: Path, how: str) -> dict[str, Any]:
    """Ask, update with an answer in flight, and ask again."""
    before = said(llm)
    engine = llm.llm_engine
    engine.add_request("in flight", sounds.prompt(), sampling(IN_FLIGHT))
    steps = 0
    while steps < CUT:
        steps = max((len(o.outputs[0].token_ids) for o in engine.step()), default=steps)
    push(llm, pushed, how)
    finished: list[Any] = []
    while not finished:
        finished = [output for output in engine.step() if output.finished]
    return {
        "before": before,
        "in flight": pairs(finished[0].outputs[0]),
        "after": said(llm),
        "again": said(llm),
    }


def push(llm: Any, pushed: Path, how: str) -> None:
    """Update the engine from a path."""
    import flashquant

    if how == "flashquant":
        flashquant.reload_weights(llm, pushed)
    else:
        llm.collective_rpc("reload_weights", kwargs={"weights_path": str(pushed)})


def said(llm: Any, before: Sequence[list[float]] = (), tokens: int = 8) -> list[list[float]]:
    """The next tokens, greedy, after the sound and what was said before."""
    prompt = sounds.prompt()
    prompt["prompt_token_ids"] += [int(token) for token, _ in before]
    (answer,) = llm.generate([prompt], sampling(tokens), use_tqdm=False)
    return pairs(answer.outputs[0])


def sampling(tokens: int) -> Any:
    """Greedy, with log-probs."""
    from vllm import SamplingParams

    return SamplingParams(
        max_tokens=tokens, temperature=0, ignore_eos=True, logprobs=0, detokenize=False
    )


def pairs(output: Any) -> list[list[float]]:
    """Each token of an answer with its log-prob."""
    steps = zip(output.token_ids, output.logprobs, strict=True)
    return [[token, step[token].logprob] for token, step in steps]


if __name__ == "__main__":
    print_result(main(*sys.argv[1:]))
