"""How long does a sync keep the engine from generating, if it is prepared?

    python -m benchmarks.pause [--model smollm2] [--schemes int8 fp8_vllm ...] [--updates 7]
                               [--clients 4] [--out benchmarks/out]

An `AsyncLLM` of each scheme, in a process of its own with its engine core in another, while
clients generate without a stop. Every update is `reload_weights(..., prepare=True)`. Inside the
engine core, in the same moments, the copy of everything that the kernels read is timed: live
memory copied to as much memory, which is what the swap would cost if it were nothing but a copy.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import os
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from benchmarks import environment, models, under_load
from benchmarks.results import described, machine, markdown, save_json, save_text

SCHEMES = ("bf16", "int8", "fp8_vllm", "fp8_channel")
_RESULT = "RESULT "


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawTextHelpFormatter
    )
    parser.add_argument("--model", default="smollm2", choices=models.NAMES)
    parser.add_argument("--schemes", nargs="+", default=list(SCHEMES))
    parser.add_argument("--updates", type=int, default=7)
    parser.add_argument("--clients", type=int, default=4)
    parser.add_argument("--out", type=Path, default=Path("benchmarks/out"))
    parser.add_argument("--here", action="store_true", help=argparse.SUPPRESS)
    options = parser.parse_args(argv)
    if options.here:
        path = models.checkpoint(options.model)
        policies = models.both_policies(path)
        found = asyncio.run(under_load.measure(path, policies, options.updates, options.clients))
        sys.stdout.write(f"{_RESULT}{json.dumps(found)}\n")
        return 0
    results = {scheme: _elsewhere(options, scheme) for scheme in options.schemes}
    rows = [under_load.row(scheme, found) for scheme, found in results.items()]
    table = markdown(under_load.TITLES, rows)
    said = f"{options.model}, {options.clients} clients, medians of {options.updates} updates"
    text = f"{described(machine())}\n\n{said}\n\n{table}\n"
    sys.stdout.write(text)
    save_text(text, options.out / "pause.md")
    save_json(results, machine(), options.out / "pause.json")
    return 0


def _elsewhere(options: argparse.Namespace, scheme: str) -> dict[str, Any]:
    environment.prepare()
    own = {
        "FLASHRL_CONFIG": scheme,
        "VLLM_ENABLE_V1_MULTIPROCESSING": "1",
        "VLLM_ALLOW_INSECURE_SERIALIZATION": "1",  # `copy_of_codes` travels by pickle
    }
    command = [sys.executable, "-m", "benchmarks.pause", "--here", "--model", options.model]
    command += ["--updates", str(options.updates), "--clients", str(options.clients)]
    ended = subprocess.run(
        command, env={**os.environ, **own}, stdout=subprocess.PIPE, text=True, check=True
    )
    line = next(line for line in ended.stdout.splitlines() if _RESULT in line)
    found: dict[str, Any] = json.loads(line.partition(_RESULT)[2])
    return found


if __name__ == "__main__":
    raise SystemExit(main())
