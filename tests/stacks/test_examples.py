"""The examples say what a stack understands: names by its own configuration, or by a run."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

from tests.stacks import overlays
from tests.stacks.running import run
from tools.models import short_smollm2

EXAMPLES = overlays.ROOT / "examples"


@pytest.mark.parametrize(
    ("stack", "file"),
    [
        pytest.param(stack, file, marks=overlays.needed(stack), id=file)
        for stack, file in [
            ("verl", "verl.sh"),
            ("openrlhf", "openrlhf.sh"),
            ("skyrl", "skyrl.sh"),
            ("areal", "areal.yaml"),
            ("ms-swift", "ms_swift.sh"),
        ]
    ],
)
def test_a_stack_knows_every_setting_of_its_example(stack: str, file: str, tmp_path: Path) -> None:
    """And would say so, were one misspelt."""
    text = (EXAMPLES / file).read_text()
    misspelt = tmp_path / file
    misspelt.write_text(re.sub("(corr|deco|imp)", r"\1s", text))

    answer = run(stack, "settings", stack, EXAMPLES / file, scheme="")
    wrong = run(stack, "settings", stack, misspelt, scheme="")

    assert answer["found"]
    assert answer["refused"] == []
    assert wrong["refused"]


@pytest.mark.parametrize("script", sorted(EXAMPLES.glob("*.sh")), ids=lambda path: path.name)
def test_a_script_parses(script: Path) -> None:
    subprocess.run(["bash", "-n", script], check=True)


@pytest.mark.engine
@pytest.mark.parametrize(
    ("example", "stack"),
    [
        pytest.param("plain_loop", None),
        pytest.param("trl_grpo", "trl", marks=overlays.needed("trl")),
    ],
)
def test_an_example_runs(example: str, stack: str | None, tmp_path: Path) -> None:
    """From the environment variable alone, on the first layers of a real model."""
    model = short_smollm2.make(tmp_path / "model")
    output = ["--output", tmp_path / "trained"] if stack else []
    command = [sys.executable, "-m", f"examples.{example}", "--model", model, "--steps", "2"]

    done = subprocess.run(
        [*command, *output],
        cwd=overlays.ROOT,
        env={
            **(overlays.environment(stack) if stack else os.environ),
            "FLASHRL_CONFIG": "int8",
            "VLLM_ENABLE_V1_MULTIPROCESSING": "1",
            # TRL has its engine compiled.
            **({"TORCHDYNAMO_DISABLE": "0", "VLLM_CPU_KVCACHE_SPACE": "1"} if stack else {}),
        },
        capture_output=True,
        text=True,
        timeout=500,
        check=False,
    )

    assert done.returncode == 0, done.stderr[-4000:]
    assert "in int8" in done.stdout + done.stderr  # flashquant's own log line
