"""A program of `tests/engine/programs` in a process of its own, patched by the environment."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

from tests.engine.programs.engine import RESULT_FILE

ROOT = Path(__file__).parents[2]


def run(
    program: str, *arguments: object, launcher: tuple[str, ...] = (), **environment: str
) -> dict[str, Any]:
    """What it answers, as one JSON object."""
    with tempfile.TemporaryDirectory() as scratch:
        file = Path(scratch, "result.json")
        ended = subprocess.run(
            [
                sys.executable,
                *launcher,
                "-m",
                f"tests.engine.programs.{program}",
                *map(str, arguments),
            ],
            cwd=ROOT,
            env={**os.environ, **environment, RESULT_FILE: str(file)},
            capture_output=True,
            text=True,
            timeout=500,
            check=False,
        )
        assert file.exists(), f"exit code {ended.returncode}\n{ended.stderr[-4000:]}"
        return dict(json.loads(file.read_text()))
