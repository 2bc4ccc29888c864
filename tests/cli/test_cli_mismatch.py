"""`flashquant mismatch`: a sentence, a picture beside the log, numbers for machines."""

from __future__ import annotations

import json
import math
from pathlib import Path

import pytest

from flashquant.cli.main import main


@pytest.fixture
def log(tmp_path: Path) -> Path:
    """A rollout whose sampler cut off half of what the trainer thinks likely."""
    file = tmp_path / "run.jsonl"
    record = {"trainer": [math.log(0.2 + i / 900) for i in range(40)]}
    record["rollout"] = [value + math.log(2) for value in record["trainer"]]
    file.write_text(json.dumps(record) + "\n")
    return file


def test_it_says_what_dominates_and_draws_it(log: Path, capsys: pytest.CaptureFixture[str]) -> None:
    pytest.importorskip("matplotlib")

    assert main(["mismatch", str(log)]) == 0

    said = capsys.readouterr().out
    assert said.startswith("Mostly sampling truncation: the trainer gives 50.0%")
    assert "40 tokens" in said
    assert log.with_suffix(".png").is_file()


def test_numbers_for_machines_without_a_picture(
    log: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["mismatch", str(log), "--no-png", "--json"]) == 0

    found = json.loads(capsys.readouterr().out)
    assert found["cause"] == "sampling truncation"
    assert found["cut"] == pytest.approx(0.5)
    assert found["png"] is None
    assert not log.with_suffix(".png").exists()


def test_a_log_that_is_none_is_an_error(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["mismatch", str(tmp_path / "no.jsonl"), "--no-png"]) == 1

    assert "is no file" in capsys.readouterr().err
