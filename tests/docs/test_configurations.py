"""Every YAML file that a page shows is one that FLASHRL_CONFIG may name, or a stack's own."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import yaml

from flashquant.cli.main import main
from flashquant.config.schema import load_config
from tests.docs import pages
from tests.docs.pages import ROOT, Block


def is_part(part: Any, whole: Any) -> bool:
    """Whether all that one value says is said by another."""
    if isinstance(part, dict):
        return all(key in whole and is_part(value, whole[key]) for key, value in part.items())
    if isinstance(part, list):
        return all(any(is_part(value, other) for other in whole) for value in part)
    return bool(part == whole)


@pytest.mark.parametrize("block", pages.of("yaml"), ids=str)
def test_a_configuration_is_read(block: Block, tmp_path: Path) -> None:
    said = yaml.safe_load(block.text)
    if "configs" not in said:  # a stack's: its example is held to the stack by `tests/stacks`
        assert is_part(said, yaml.safe_load((ROOT / "examples" / "areal.yaml").read_text()))
        return
    file = tmp_path / "run.yaml"
    file.write_text(block.text)
    (tmp_path / "runs").mkdir()
    for key in ("profile", "kv_scales"):  # what it names by a relative path lies beside it
        for entry in said["configs"]:
            if entry.get(key, "").startswith("runs/"):
                (tmp_path / entry[key]).touch()

    assert len(load_config(str(file)).configs) == len(said["configs"])


@pytest.mark.parametrize("block", pages.of("json"), ids=str)
def test_a_log_is_read_by_the_command_that_is_for_it(block: Block, tmp_path: Path) -> None:
    log = tmp_path / "log.jsonl"
    log.write_text("".join(json.dumps(json.loads(line)) + "\n" for line in [block.text] * 2))

    assert main(["mismatch", str(log)]) == 0


def test_every_block_is_in_a_language_that_is_checked() -> None:
    """What says no language is the output of a command, or a drawing."""
    known = {"python", "bash", "console", "yaml", "json", ""}

    assert [str(block) for block in pages.blocks() if block.language not in known] == []
