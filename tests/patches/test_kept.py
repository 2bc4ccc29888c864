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


@pytest.fixture(scope="module")
def asked(tmp_path_factory: pytest.TempPathFactory) -> tuple[dict[str, str], list[str]]:
    """What is answered for two models on the hub, and every file that was asked for.

    In a process of its own: the hub's client reads its environment when it is imported.
    """
    files = {
        "owner/model": {"model.safetensors.index.json": INDEX.encode(), "1.safetensors": b""},
        "owner/none": {"config.json": b"{}"},
    }
    home = tmp_path_factory.mktemp("home")
    with hub({repo: {"main": held} for repo, held in files.items()}) as at:
        environ = {**os.environ, "HF_ENDPOINT": at.url, "HF_HOME": str(home), "HF_HUB_OFFLINE": "0"}
        ran = subprocess.run(
            [sys.executable, "-c", PROGRAM, *files], env=environ, stdout=subprocess.PIPE, check=True
        )
        return json.loads(ran.stdout.splitlines()[-1]), list(at.asked)


PROGRAM = """
import json, sys
from flashquant.errors import ConfigError
from flashquant.patches.seams import kept

def answer(model):
    try:
        return str(kept.names_in(model, None))
    except ConfigError as refusal:
        return f"ConfigError: {refusal}"

print(json.dumps({model: answer(model) for model in sys.argv[1:]}))
"""


def test_of_a_model_on_the_hub_only_the_index_is_fetched(
    asked: tuple[dict[str, str], list[str]],
) -> None:
    said, files = asked

    assert said["owner/model"] == "('a.q_proj.weight', 'a.norm.weight')"
    assert any("model.safetensors.index.json" in file for file in files)
    assert not any("1.safetensors" in file for file in files)


def test_a_model_on_the_hub_without_safetensors_is_refused(
    asked: tuple[dict[str, str], list[str]],
) -> None:
    said, _ = asked

    assert "ConfigError: keep names modules" in said["owner/none"]
    assert "owner/none has no safetensors" in said["owner/none"]
