"""The scales of a KV cache, sent to two ranks.

Usage: python -m tests.engine.programs.cache_scales STARTS_ON PUSHED SCALES (JSON)
Prints one JSON object: digests after each update, at once and prepared, and after a refused one;
and the numbers that each rank calls its kernels with.
"""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

import flashquant
from tests.engine.programs.engine import OPTIONS, print_result
from tests.engine.programs.failing import raised_by


def numbers(worker: Any) -> list[tuple[float, float]]:
    """Of keys and of values, layer by layer."""
    return [
        (module._k_scale_float, module._v_scale_float)
        for module in worker.get_model().modules()
        if hasattr(module, "_k_scale_float")
    ]


def main(starts_on: str, pushed: str, scales: str) -> dict[str, Any]:
    from vllm import LLM

    llm, found = LLM(starts_on, **OPTIONS, tensor_parallel_size=2), {}
    first = json.loads(scales)
    other = dict.fromkeys(first, (2.0, 4.0))
    found["start"] = flashquant.status(llm).digest
    held = {"start": llm.collective_rpc(numbers)}
    for prepare in (False, True):
        kind = "prepared" if prepare else "at once"
        report = flashquant.reload_weights(llm, Path(pushed), kv_scales=other, prepare=prepare)
        found[kind] = [report.digest, flashquant.status(llm).digest]
        wrong = {**other, next(iter(other)): (1.0, float("nan"))}
        found[f"refused {kind}"] = raised_by(
            lambda bad=wrong, prepare=prepare: flashquant.reload_weights(
                llm, Path(starts_on), kv_scales=bad, prepare=prepare
            )
        )
        found[f"after {kind}"] = flashquant.status(llm).digest
        held["pushed"] = llm.collective_rpc(numbers)
        flashquant.reload_weights(llm, Path(starts_on), kv_scales=first)
    found["end"] = flashquant.status(llm).digest
    held["end"] = llm.collective_rpc(numbers)
    return {**found, "numbers": held}


if __name__ == "__main__":
    print_result(main(*sys.argv[1:]))
