"""A mixture of experts over two ranks, pushed to in every way; one rank fails alone, and dies.

Usage: python -m tests.engine.programs.mixtures STARTS_ON PUSHED tensors|experts EXPERT [WAY ...]
The third says whether each rank has a part of every expert, or every second expert; EXPERT is
the name of a tensor of one of them; more ways of pushing than `WAYS` may follow. Prints one JSON
object: what both ranks hold after each step, and what was raised.
"""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

from tests.engine.programs.engine import OPTIONS, PROMPT, print_result
from tests.engine.programs.failing import fail_in_the_middle, raised_by
from tools.models import tiny_models

WAYS = (
    "one_tensor_a_call",
    "buckets_cut_inside_qkv",
    "one_iterator",
    "shuffled",
    "layerwise_bracket",
)


def main(starts_on: str, pushed: str, cut: str, expert: str, *more: str) -> dict[str, Any]:
    from vllm import LLM

    import flashquant

    llm = LLM(
        starts_on,
        **OPTIONS,
        tensor_parallel_size=2,
        enable_expert_parallel=cut == "experts",
        enable_prefix_caching=False,
        worker_extension_cls="tests.engine.programs.on_rank.Pushed",
    )

    def stands() -> list[Any]:
        return [flashquant.status(llm).ranks, _said(llm)]

    def there_and_back(push: Any) -> list[Any]:
        push(pushed)
        b = stands()
        push(starts_on)
        return [b, stands()]

    def prepared(path: str) -> None:
        flashquant.reload_weights(llm, tiny_models.tensors(Path(path)), prepare=True)

    result: dict[str, Any] = {"start": stands(), "experts": llm.collective_rpc("held_experts")}
    result["pushes"] = {
        "reload_weights": there_and_back(lambda path: flashquant.reload_weights(llm, Path(path))),
        "prepared": there_and_back(prepared),
        "vLLM's own": there_and_back(
            lambda path: llm.collective_rpc("reload_weights", kwargs={"weights_path": path})
        ),
    } | {
        way: there_and_back(lambda path, way=way: llm.collective_rpc("take", args=(way, path)))
        for way in (*WAYS, *more)
    }
    result["failures"] = {
        name: [raised_by(push), flashquant.status(llm).ranks]
        for name, push in _failing(llm, pushed, expert).items()
    }
    flashquant.reload_weights(llm, Path(pushed))
    result["afterwards"] = stands()
    llm.collective_rpc(fail_in_the_middle, kwargs={"rank": 1, "dies": True})
    result["lost"] = raised_by(lambda: flashquant.reload_weights(llm, Path(starts_on)))
    return result


def _failing(llm: Any, pushed: str, expert: str) -> dict[str, Any]:
    """What is refused, on whichever rank notices."""
    import flashquant

    def rank_1_fails() -> None:
        llm.collective_rpc(fail_in_the_middle, kwargs={"rank": 1, "dies": False})
        flashquant.reload_weights(llm, Path(pushed))

    def with_nan() -> dict[str, Any]:
        weights = tiny_models.tensors(Path(pushed))
        weights[expert] = weights[expert].clone()
        weights[expert][3, 5] = float("nan")
        return weights

    return {
        "rank 1 fails": rank_1_fails,
        "a NaN": lambda: flashquant.reload_weights(llm, with_nan()),
        "a NaN, prepared": lambda: flashquant.reload_weights(llm, with_nan(), prepare=True),
        "a NaN in a bracket": lambda: llm.collective_rpc(
            "take", args=("layerwise_bracket", pushed, expert)
        ),
    }


def _said(llm: Any) -> list[list[float]]:
    """Greedy tokens with their log-probs."""
    from vllm import SamplingParams

    sampling = SamplingParams(max_tokens=4, temperature=0, ignore_eos=True, logprobs=0)
    (answer,) = llm.generate([PROMPT], sampling, use_tqdm=False)
    output = answer.outputs[0]
    steps = zip(output.token_ids, output.logprobs, strict=True)
    return [[token, step[token].logprob] for token, step in steps]


if __name__ == "__main__":
    print_result(main(*sys.argv[1:]))
