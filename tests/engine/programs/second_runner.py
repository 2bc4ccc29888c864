"""An engine as vLLM runs it on a GPU: its second model runner, scheduling ahead.

That runner's kernels are Triton's, and run in Triton's interpreter here (TRITON_INTERPRET=1).

Usage: python -m tests.engine.programs.second_runner STARTS_ON PUSHED
Prints one JSON object: digests and tokens before and after, an answer during which an update
came, and what happened to a dummy batch and to a request in an open update.
"""

from __future__ import annotations

import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

from triton.backends import backends

from tests import tiny_models
from tests.engine.programs.engine import OPTIONS, PROMPT, print_result
from tests.engine.programs.failing import raised_by

# vLLM asks whether Triton has a backend for the CPU, which the interpreter does not need.
backends["cpu"] = SimpleNamespace(driver=SimpleNamespace(is_active=lambda: True), compiler=None)


def main(starts_on: str, pushed: str) -> dict[str, Any]:
    from vllm import LLM, SamplingParams

    from tests.engine.serving import scheduling_ahead

    with scheduling_ahead():
        llm = LLM(starts_on, **OPTIONS)
    import flashquant
    from flashquant.patches.loading import session_of

    engine = llm.llm_engine
    core: Any = engine.engine_core.engine_core

    def sampling() -> Any:  # anew each time: `generate` writes into it
        return SamplingParams(max_tokens=16, temperature=0, ignore_eos=True, logprobs=0)

    def said(output: Any) -> list[list[float]]:
        steps = zip(output.token_ids, output.logprobs, strict=True)
        return [[token, step[token].logprob] for token, step in steps]

    def answer() -> list[list[float]]:
        return said(llm.generate([PROMPT], sampling(), use_tqdm=False)[0].outputs[0])

    result: dict[str, Any] = {
        "runner": type(core.model_executor.driver_worker.worker.model_runner).__mro__[1].__module__,
        "scheduler": type(core.scheduler).__name__,
        "before": [flashquant.status(llm).digest, answer()],
    }
    flashquant.reload_weights(llm, Path(pushed))
    result["after"] = [flashquant.status(llm).digest, answer()]

    flashquant.reload_weights(llm, Path(starts_on))
    engine.add_request("in flight", PROMPT, sampling())
    last = [output for _ in range(7) for output in engine.step()]
    result["out"] = len(last[-1].outputs[0].token_ids)
    result["on its way"] = bool(core.batch_queue)
    flashquant.reload_weights(llm, Path(pushed))
    while engine.has_unfinished_requests():
        last += engine.step()
    result["in flight"] = said(last[-1].outputs[0])

    (session,) = llm.apply_model(session_of)
    session.begin()
    session.push(list(tiny_models.tensors(Path(starts_on)).items())[:14])
    core.execute_dummy_batch()
    runner = core.model_executor.driver_worker.worker.model_runner
    step = SimpleNamespace(total_num_scheduled_tokens=1)
    result["refused"] = raised_by(lambda: runner.execute_model(step))
    session.abandon()
    return {**result, "undone": [flashquant.status(llm).digest, answer()]}


if __name__ == "__main__":
    print_result(main(*sys.argv[1:]))
