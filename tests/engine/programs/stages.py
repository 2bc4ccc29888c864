"""A pipeline of two stages, each with half of the layers, pushed to and failing alone.

Usage: python -m tests.engine.programs.stages STARTS_ON PUSHED
Prints one JSON object: the fingerprints of both stages and what they say, step by step, and what
was raised.
"""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

from tests.engine.programs.engine import OPTIONS, PROMPT, print_result
from tests.engine.programs.failing import fail_in_the_middle, raised_by
from tools.models import tiny_models


def main(starts_on: str, pushed: str) -> dict[str, Any]:
    from vllm import LLM, SamplingParams

    import flashquant
    from flashquant.sender import Sender

    llm = LLM(
        starts_on,
        **OPTIONS,
        pipeline_parallel_size=2,
        enable_prefix_caching=False,
        worker_extension_cls="tests.engine.programs.on_rank.Pushed",
    )

    def stands() -> list[Any]:
        sampling = SamplingParams(max_tokens=4, temperature=0, ignore_eos=True)
        (answer,) = llm.generate([PROMPT], sampling, use_tqdm=False)
        status = flashquant.status(llm)
        return [dict(status.parameters), list(answer.outputs[0].token_ids), status.ranks]

    status = flashquant.status(llm)
    result: dict[str, Any] = {
        "a": stands(),
        "in_bf16": dict(status.in_bf16),
        "overrides": dict(status.overrides),
    }
    report = flashquant.reload_weights(llm, Path(pushed))
    result |= {"b": stands(), "ignored": list(report.ignored)}
    placed = [*status.direct, *status.staged, *status.fallback]
    result["layers"] = {"report": list(report.layers), "status": placed}
    result["pushes"] = []
    for way, path in {
        "one_tensor_a_call": starts_on,
        "layerwise_bracket": pushed,
        "one_iterator": starts_on,
    }.items():
        llm.collective_rpc("take", args=(way, path))
        result["pushes"].append(stands())
    weights = tiny_models.tensors(Path(pushed))
    flashquant.reload_weights(llm, weights, prepare=True)
    result["pushes"].append(stands())
    llm.collective_rpc(fail_in_the_middle, kwargs={"rank": 1, "dies": False})
    result["failed"] = raised_by(lambda: flashquant.reload_weights(llm, Path(starts_on)))
    result["after"] = stands()
    left = {n: t for n, t in weights.items() if n != "model.norm.weight"}
    result["incomplete"] = raised_by(lambda: flashquant.reload_weights(llm, left))
    result["last"] = stands()

    sender = Sender(flashquant.manifest(llm), delta=True)
    flashquant.apply_delta(llm, sender.bundle(tiny_models.tensors(Path(starts_on))))
    result["by deltas"] = [stands()]
    flashquant.apply_delta(llm, sender.bundle(weights))
    result["by deltas"].append(stands())
    return result


if __name__ == "__main__":
    print_result(main(*sys.argv[1:]))
