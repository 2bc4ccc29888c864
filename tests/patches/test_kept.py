"""Where the names of a checkpoint are looked up, for what stays in bf16."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from flashquant.errors import ConfigError
from flashquant.patches.seams import kept
from tests.support.hub import hub

INDEX = json.dumps({"weight_map": {"a.q_proj.weight": "1.safetensors", "a.norm.weight": "2"}})


def test_an_index_in_a_folder_is_enough_if_its_files_are_there(tmp_path: Path) -> None:
    (tmp_path / "model.safetensors.index.json").write_text(INDEX)
    with pytest.raises(ConfigError, match=r"keep names modules of the checkpoint, and .*folder"):
        kept.names_in(str(tmp_path), None)


def test_of_a_model_on_the_hub_only_the_index_is_fetched(tmp_path: Path) -> None:
    files = {"model.safetensors.index.json": INDEX.encode(), "1.safetensors": b"", "2": b""}
    with hub({"owner/repo": {"main": files}}) as at:
        said = names_of("owner/repo", at.url, tmp_path)

    assert said == "('a.q_proj.weight', 'a.norm.weight')"
    assert not any("1.safetensors" in asked for asked in at.asked)


def test_a_model_on_the_hub_without_safetensors_is_refused(tmp_path: Path) -> None:
    with hub({"owner/repo": {"main": {"config.json": b"{}"}}}) as at:
        said = names_of("owner/repo", at.url, tmp_path)

    assert "ConfigError: keep names modules" in said
    assert "owner/repo has no safetensors" in said


def names_of(model: str, endpoint: str, home: Path) -> str:
    """In a process of its own: the client reads its environment when it is imported."""
    program = f"from flashquant.patches.seams import kept; print(kept.names_in({model!r}, None))"
    environ = {**os.environ, "HF_ENDPOINT": endpoint, "HF_HOME": str(home), "HF_HUB_OFFLINE": "0"}
    ran = subprocess.run(
        [sys.executable, "-c", program], env=environ, capture_output=True, text=True, check=False
    )
    return (ran.stdout.strip() or ran.stderr.strip()).splitlines()[-1]
