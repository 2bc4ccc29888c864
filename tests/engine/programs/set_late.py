"""FLASHRL_CONFIG is set when a process has made an engine already.

Usage: python -m tests.engine.programs.set_late STARTS_ON PUSHED
Prints one JSON object: what a push into the first engine and its status raise, before the variable
is set and afterwards; and the scheme of an engine that is made then.
"""

from __future__ import annotations

import os
import sys
from pathlib import Path
from typing import Any

from tests.engine.programs.engine import OPTIONS, print_result
from tests.engine.programs.failing import raised_by


def main(starts_on: str, pushed: str) -> dict[str, Any]:
    from vllm import LLM

    import flashquant

    first = LLM(starts_on, **OPTIONS)
    result: dict[str, Any] = {"patched": [flashquant.is_patched()]}
    result["unset"] = raised_by(lambda: flashquant.reload_weights(first, Path(pushed)))
    os.environ["FLASHRL_CONFIG"] = "int8"
    second = LLM(starts_on, **OPTIONS)
    result["patched"].append(flashquant.is_patched())
    result["set"] = raised_by(lambda: flashquant.reload_weights(first, Path(pushed)))
    result["status"] = raised_by(lambda: flashquant.status(first))
    found = flashquant.reload_weights(second, Path(pushed))
    return {**result, "scheme": flashquant.status(second).scheme, "digest": found.digest}


if __name__ == "__main__":
    print_result(main(*sys.argv[1:]))
