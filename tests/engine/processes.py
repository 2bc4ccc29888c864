"""Programs that need engines in processes of their own, and what they answer."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

from tests.engine.programs.engine import RESULT_FILE
from tools.models.policies import Policies

ROOT = Path(__file__).parents[2]
CORES = "|".join(map(str, sorted(os.sched_getaffinity(0))[:2]))
TORCHRUN = ("-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2")


def run_program(
    program: str, policies: Policies, launcher: tuple[str, ...] = (), **environment: str
) -> dict[str, Any]:
    """What a program answers that is given the checkpoints of both policies."""
    checkpoints = (policies.bf16("a"), policies.bf16("b"))
    return run(program, *checkpoints, launcher=launcher, **environment)


def run(
    program: str, *arguments: object, launcher: tuple[str, ...] = (), **environment: str
) -> dict[str, Any]:
    """What a program of `tests/engine/programs` answers in a process of its own."""
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


def assert_lost(raised: list[Any], *, rank: int) -> None:
    """Within 30 s, the call said who died, and what remains."""
    kind, says, seconds = raised
    assert kind == "WorkerLost"
    assert f"rank {rank} (process" in says
    assert "Nothing of the update is served" in says
    assert seconds < 30
