"""One scheme, as a program of its own.

    python -m flashquant.patches.diagnostics.examination SCHEME FOLDER ANSWER
        [--mode graphs] [--attention NAME]

Each step is a line of JSON in ANSWER, written when it begins and when it is over: standard
output belongs to vLLM.
"""

from __future__ import annotations

import argparse
import json
import os
import sys
from dataclasses import asdict
from pathlib import Path

from flashquant.patches.diagnostics.examination.engines import MODES, SCHEMES, examine


def main() -> int:
    """Examine, and answer."""
    parser = argparse.ArgumentParser(prog="python -m flashquant.patches.diagnostics.examination")
    parser.add_argument("scheme", choices=SCHEMES)
    parser.add_argument("folder", type=Path)
    parser.add_argument("answer", type=Path)
    parser.add_argument("--mode", choices=MODES, default="eager")
    parser.add_argument("--attention")
    chosen = parser.parse_args()
    with chosen.answer.open("w") as answer:
        for step in examine(
            chosen.scheme, chosen.folder, mode=chosen.mode, attention=chosen.attention
        ):
            answer.write(json.dumps(asdict(step)) + "\n")
            answer.flush()
    return 0


if __name__ == "__main__":
    code = main()
    sys.stdout.flush()
    sys.stderr.flush()
    # How an engine behaves when it is torn down is not what was asked, and it takes its time.
    os._exit(code)
