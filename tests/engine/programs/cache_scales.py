"""The scales of a KV cache, sent to workers in other processes.

Usage: python -m tests.engine.programs.cache_scales STARTS_ON PUSHED SCALES (JSON)
Prints one JSON object: digests after each update, at once and prepared, and after a refused one.
"""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

import flashquant
from tests.engine.programs.engine import OPTIONS, print_result
from tests.engine.programs.failing import raised_by


def main(starts_on: str, pushed: str, scales: str) -> dict[str, Any]:
    from vllm import LLM

    llm, found = LLM(starts_on, **OPTIONS), {}
    sent = json.loads(scales)
    ones = dict.fromkeys(sent, (1.0, 1.0))
    found["start"] = flashquant.status(llm).digest
    for prepare in (False, True):
        kind = "prepared" if prepare else "at once"
        report = flashquant.reload_weights(llm, Path(pushed), kv_scales=sent, prepare=prepare)
        found[kind] = [report.digest, flashquant.status(llm).digest]
        wrong = {**sent, next(iter(sent)): (1.0, float("nan"))}
        found[f"refused {kind}"] = raised_by(
            lambda bad=wrong, prepare=prepare: flashquant.reload_weights(
                llm, Path(starts_on), kv_scales=bad, prepare=prepare
            )
        )
        found[f"after {kind}"] = flashquant.status(llm).digest
        flashquant.reload_weights(llm, Path(starts_on), kv_scales=ones)
    found["end"] = flashquant.status(llm).digest
    return found


if __name__ == "__main__":
    print_result(main(*sys.argv[1:]))
