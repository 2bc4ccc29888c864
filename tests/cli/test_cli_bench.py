"""`flashquant bench`: real engines in a process of their own, and what it refuses."""

from __future__ import annotations

import json
import os
from pathlib import Path

import pytest

from flashquant.cli.main import main
from tests.support import forked
from tools.models import tiny_models


@pytest.mark.engine
def test_every_way_is_timed_beside_the_copy_limit(tmp_path: Path) -> None:
    model, file = tiny_models.make("qwen2", 0, tmp_path / "tiny"), tmp_path / "bench.json"
    chosen = ["bench", f"--model={model}", "--scheme=fp8_channel", "--rounds=2", f"--json={file}"]

    # Engines that are collected take the others of their process with them.
    output = tmp_path / "output"
    ended = forked.end([forked.start("flashquant", chosen, os.environ, output)], timeout=300)

    said = output.read_text()
    assert ended == [0], said
    found = json.loads(file.read_text())
    timings = {timing["name"]: timing for timing in found["syncs"]}
    assert list(timings) == [
        "copy limit",
        "vLLM's own reload",
        "vLLM's own reload, fp8_per_channel",
        "flashquant, fp8_channel",
        "flashquant, fp8_channel, atomic=False",
    ]
    assert all(len(t["rounds"]) == 2 and min(t["rounds"]) > 0 for t in timings.values())
    ours = timings["flashquant, fp8_channel"]
    assert 0 < sum(ours["phases"].values()) < sum(ours["rounds"])
    assert not timings["vLLM's own reload"]["phases"]
    assert found["bytes"] == sum(t.nbytes for t in tiny_models.tensors(model).values())
    assert "copy limit" in said
    assert "a new engine" in said


@pytest.mark.parametrize(
    ("wrong", "said"),
    [(["--model=/nowhere"], "no config.json"), (["--model=.", "--rounds=0"], "at least one turn")],
)
def test_what_cannot_be_measured_is_refused(
    wrong: list[str], said: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["bench", *wrong]) == 1

    assert said in capsys.readouterr().err
