"""The rollout side of every program here: an engine in processes of its own, and its answers."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager
from typing import Any

from tests.support import fp8

fp8.multiply_as_everywhere()  # here, for this module is imported in workers, too
PROMPTS = [list(range(5 + shift, 45 + shift)) for shift in (0, 11, 200)]


class Imported:
    """A worker extension without methods: vLLM imports its module in each worker."""


def start(checkpoint: str, **options: Any) -> Any:
    """vLLM as a stack starts it, patched by nothing but its plugin and the environment."""
    from vllm import LLM

    return LLM(
        checkpoint,
        skip_tokenizer_init=True,
        enforce_eager=True,
        kv_cache_memory_bytes=16 << 20,
        max_model_len=128,
        dtype="bfloat16",
        **{"worker_extension_cls": f"{__name__}.{Imported.__name__}", **options},
    )


def said(llm: Any) -> dict[str, Any]:
    """The digest of an engine, and greedy tokens with the log-probs of prompt and answer.

    One prompt after another: what is computed together decides the last bits.
    """
    from vllm import SamplingParams

    import flashquant

    sampling = SamplingParams(
        max_tokens=16, temperature=0, ignore_eos=True, prompt_logprobs=0, logprobs=0
    )
    llm.reset_prefix_cache()
    tokens, logprobs = [], []
    for prompt in PROMPTS:
        (answer,) = llm.generate([{"prompt_token_ids": prompt}], sampling, use_tqdm=False)
        positions = [*answer.prompt_logprobs[1:], *answer.outputs[0].logprobs]
        tokens.append(list(answer.outputs[0].token_ids))
        logprobs.append([next(iter(position.values())).logprob for position in positions])
    return {"digest": flashquant.status(llm).digest, "tokens": tokens, "logprobs": logprobs}


@contextmanager
def beside(llm: Any, method: str, *arguments: Any) -> Iterator[Future[Any]]:
    """The workers are in a method, receiving, while the block sends."""
    with ThreadPoolExecutor(1) as thread:
        answer = thread.submit(llm.collective_rpc, method, args=arguments)
        yield answer
        answer.result()


def raised_by(call: Callable[[], object]) -> list[str]:
    """The class and the words of what a call raises."""
    try:
        call()
    except Exception as failure:  # whatever it is, the test looks at it
        return [type(failure).__name__, str(failure)]
    return ["nothing", ""]


def print_result(result: dict[str, Any]) -> None:
    """The line that `tests.stacks.running` waits for."""
    print("RESULT", json.dumps(result), flush=True)
