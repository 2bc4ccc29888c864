"""Programs that need engines in processes of their own, and what they answer."""

from __future__ import annotations

import json
import os
import socket
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
import torch

from tests.engine.programs.engine import RESULT_FILE
from tests.support import forked
from tests.support.gpu import HAS_GPU
from tools.models.policies import Policies

ROOT = Path(__file__).parents[2]
TIMEOUT = 500  # seconds
CORES = "|".join(map(str, sorted(os.sched_getaffinity(0))[:2]))


def run_program(program: str, policies: Policies, **environment: str) -> dict[str, Any]:
    """What a program answers that is given the checkpoints of both policies."""
    return run(program, policies.bf16("a"), policies.bf16("b"), **environment)


def run(program: str, *arguments: object, ranks: int = 1, **environment: str) -> dict[str, Any]:
    """What a program of `tests/engine/programs` answers in a process of its own.

    Args:
        ranks: how many such processes there are, which find in their environment what
            torchrun would have written there.

    """
    workers = max(ranks, 2 if environment.get("VLLM_CPU_OMP_THREADS_BIND") == CORES else 1)
    if HAS_GPU and torch.cuda.device_count() < workers:
        pytest.skip(f"this machine does not have {workers} GPUs")
    module = f"tests.engine.programs.{program}"
    with tempfile.TemporaryDirectory() as scratch:
        file, output = Path(scratch, "result.json"), Path(scratch, "output")
        environ = {**os.environ, **environment, RESULT_FILE: str(file)}
        if forked.can_have(environ):
            started = [
                forked.start(module, arguments, {**environ, **of_rank}, output)
                for of_rank in _as_torchrun(ranks)
            ]
            ended = forked.end(started, TIMEOUT)
        else:
            ended = [_spawned(module, arguments, environ, output)]
        assert file.exists(), f"exit codes {ended}\n{output.read_text()[-4000:]}"
        return dict(json.loads(file.read_text()))


def _as_torchrun(ranks: int) -> list[dict[str, str]]:
    if ranks == 1:
        return [{}]
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        meet = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(probe.getsockname()[1])}
    of = {"WORLD_SIZE": str(ranks), "LOCAL_WORLD_SIZE": str(ranks)}
    return [{**meet, **of, "RANK": str(rank), "LOCAL_RANK": str(rank)} for rank in range(ranks)]


def _spawned(
    module: str, arguments: Sequence[object], environ: dict[str, str], output: Path
) -> int:
    with output.open("w") as said:
        ended = subprocess.run(
            [sys.executable, "-m", module, *map(str, arguments)],
            cwd=ROOT,
            env=environ,
            stdout=said,
            stderr=subprocess.STDOUT,
            timeout=TIMEOUT,
            check=False,
        )
    return ended.returncode


def assert_lost(raised: list[Any], *, rank: int) -> None:
    """Within 30 s, the call said who died, and what remains."""
    kind, says, seconds = raised
    assert kind == "WorkerLost"
    assert f"rank {rank} (process" in says
    assert "Nothing of the update is served" in says
    assert seconds < 30
