"""What is known of checkpoints without an engine: `PATH SCHEME`, and more of them."""

from __future__ import annotations

import sys
from dataclasses import asdict
from pathlib import Path

import torch

import flashquant
from flashquant.patches.diagnostics import inspect_model
from tests.engine.programs.engine import print_result
from tests.support import fp8

if __name__ == "__main__":
    fp8.multiply_as_everywhere()
    asked = sys.argv[1:]
    found = [
        asdict(inspect_model(Path(path), scheme))
        for path, scheme in zip(asked[::2], asked[1::2], strict=True)
    ]
    print_result(
        {
            "inspections": found,
            "left": [flashquant.is_patched(), torch.distributed.is_initialized()],
        }
    )
