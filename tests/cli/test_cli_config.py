"""`flashquant config`: what a configuration means here, before any engine starts."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from rich.console import Console

from flashquant.cli.main import main
from flashquant.config.env import VARIABLES
from flashquant.config.keep import Blocks
from flashquant.config.schema import RolloutConfig, load_config
from tests.support.hub import hub

LLAMA = {"architectures": ["LlamaForCausalLM"], "dtype": "bfloat16", "tie_word_embeddings": True}
W8A8 = {
    "quant_method": "compressed-tensors",
    "config_groups": {"a": {"weights": {"type": "int", "num_bits": 8, "strategy": "channel"}}},
}


@pytest.fixture(autouse=True)
def nothing_is_set(monkeypatch: pytest.MonkeyPatch) -> None:
    for variable in VARIABLES:
        if variable.ours:
            monkeypatch.delenv(variable.name, raising=False)


def checkpoint(folder: Path, **more: Any) -> Path:
    folder.mkdir()
    (folder / "config.json").write_text(json.dumps({**LLAMA, **more}))
    return folder


def told(capsys: pytest.CaptureFixture[str], *arguments: str) -> dict[str, Any]:
    assert main(["config", *arguments, "--json"]) == 0
    return dict(json.loads(capsys.readouterr().out))


def test_ranks_take_the_entries_in_turn(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    checkpoint(tmp_path / "w8a8", quantization_config=W8A8)
    file = tmp_path / "mixed.yaml"
    file.write_text("configs: [{fn: int8_fast, model: w8a8, load_format: auto}, {fn: fp8}]")

    found = told(capsys, str(file), "--ranks", "3")

    first, second = found["entries"]
    assert found["source"] == str(file)
    assert (first["ranks"], second["ranks"]) == ([0, 2], [1])
    assert (first["fn"], first["scheme"], first["codes"]) == ("int8_fast", "int8", "int8")
    assert (second["scheme"], second["scales"]) == ("fp8_vllm", "tensor")
    assert first["checkpoint"]["model"] == str(tmp_path / "w8a8")
    assert first["checkpoint"]["architectures"] == ["LlamaForCausalLM"]
    assert first["by"].startswith("nothing: the checkpoint holds codes already")
    assert first["settings"] == {"load_format": "auto"}
    assert second["checkpoint"] is None


def test_a_person_reads_it_in_words(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("FLASHRL_CONFIG", "int8")

    assert main(["config", "--model", str(checkpoint(tmp_path / "bf16"))]) == 0

    said = " ".join(capsys.readouterr().out.split())
    for words in (
        "every data-parallel rank",
        "int8, a scale a channel",
        "tied head",
        "not lm_head, towers of a multimodal model",
    ):
        assert words in said
    assert "none: each channel by its own maximum" in said


def test_a_model_on_the_hub_is_named_with_its_commit(tmp_path: Path) -> None:
    """The one that an engine would get today; whether the file pins it is said, too."""
    files = {"config.json": json.dumps(LLAMA).encode()}
    kept = {key: value for key, value in os.environ.items() if not key.startswith("HF_")}
    with hub({"org/model": {"main": files, "v1": files}}) as at:
        commit = at.commit("org/model", "main")
        entries = "".join(
            f"  - {{fn: bf16, model: org/model{ref}}}\n" for ref in ("", f"@{commit}")
        )
        (tmp_path / "runs.yaml").write_text(f"configs:\n{entries}")
        done = subprocess.run(
            [sys.executable, "-m", "flashquant", "config", "runs.yaml", "--json"],
            cwd=tmp_path,
            env={**kept, "HF_ENDPOINT": at.url, "HF_HOME": str(tmp_path / "hub")},
            capture_output=True,
            text=True,
            timeout=120,
        )

    assert done.returncode == 0, done.stderr
    found = [entry["checkpoint"] for entry in json.loads(done.stdout)["entries"]]
    assert [one["revision"] for one in found] == [commit, commit]
    assert [one["pinned"] for one in found] == [False, True]


@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        ([], "FLASHRL_CONFIG is not set"),
        (["int88"], "did you mean 'int8'?"),
        (["runs/nothing.yaml"], "there is no file"),
        (["int8_prune"], "Name it under `profile`"),
        (["int8", "--ranks", "0"], "write 1 or more"),
        (["int8", "--model", "/nowhere"], "has no config.json"),
        (["int8", "--layers"], "Give it by --model"),
    ],
)
def test_what_cannot_be_is_one_line_and_no_traceback(
    arguments: list[str], says: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["config", *arguments]) == 1

    said = capsys.readouterr()
    assert said.out == ""
    assert said.err.startswith("error: ")
    assert says in said.err


def test_a_checkpoint_of_other_codes_is_refused_as_an_engine_refuses_it(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    checkpoint(tmp_path / "w8a8", quantization_config=W8A8)
    (tmp_path / "two.yaml").write_text("configs: [{fn: bf16}, {fn: fp8, model: w8a8}]")

    assert main(["config", str(tmp_path / "two.yaml")]) == 1

    said = capsys.readouterr().err
    assert said.startswith("error: entry 1 (fn: fp8): ")
    assert "is quantized already" in said


def test_a_profile_that_is_not_there_is_named_as_one(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "runs.yaml").write_text("configs: [{fn: int8, profile: gone.safetensors}]")

    assert main(["config", str(tmp_path / "runs.yaml")]) == 1

    said = capsys.readouterr().err
    assert said.startswith("error: profile: there is no file")
    assert "beside the file that names it" in said


def test_every_variable_is_listed_with_what_it_says_now(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("FLASHQUANT_NATIVE", "off")

    assert main(["config", "--env", "--json"]) == 0

    found = {one["name"]: one for one in json.loads(capsys.readouterr().out)}
    assert found.keys() == {variable.name for variable in VARIABLES}
    assert (found["FLASHQUANT_NATIVE"]["now"], found["FLASHQUANT_NATIVE"]["unset"]) == ("off", "1")


def test_on_a_narrow_terminal_every_word_of_the_list_is_whole(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr("flashquant.cli.output.console", lambda: Console(width=80))

    assert main(["config", "--env"]) == 0

    said = capsys.readouterr().out
    assert "\N{HORIZONTAL ELLIPSIS}" not in said
    assert all(variable.name in said for variable in VARIABLES)


def test_a_variable_that_says_nothing_possible_fails_the_list(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("FLASHQUANT_LEDGER", "perhaps")

    assert main(["config", "--env"]) == 1

    said = capsys.readouterr()
    assert "FLASHQUANT_LEDGER" in said.out
    assert "FLASHQUANT_LEDGER='perhaps' is neither yes nor no" in said.err


def test_neither_torch_nor_vllm_is_imported() -> None:
    program = (
        "import sys; from flashquant.cli.main import main; "
        "main(['config', 'int8']); sys.exit(bool({'torch', 'vllm'} & set(sys.modules)))"
    )

    assert subprocess.run([sys.executable, "-c", program], timeout=120).returncode == 0


def test_layers_are_those_of_the_entry_with_what_it_keeps(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """It is inspected by a file that says of the entry what decides which are quantized."""
    from flashquant.patches import diagnostics

    asked: list[Any] = []

    def look(path: Path, reference: str) -> SimpleNamespace:
        asked.append((path, load_config(reference).configs))
        kept = {"model.layers.0.mlp.down_proj": "keep"}
        schemes = {"here": None, "layers.0.up": "int8", "layers.0.o": "int4", "layers.1.o": "int4"}
        layers = [SimpleNamespace(name=name, scheme=schemes[name]) for name in schemes]
        return SimpleNamespace(layers=layers, in_bf16=kept, scheme="int8")

    monkeypatch.setattr(diagnostics, "inspect_model", look)
    checkpoint(tmp_path / "bf16")
    (tmp_path / "keep.yaml").write_text(
        "configs: [{fn: int8, model: bf16, keep: ['*.down_proj', {first: 2}]}]"
    )

    assert main(["config", str(tmp_path / "keep.yaml"), "--layers"]) == 0

    wanted = RolloutConfig(fn="int8", keep=("*.down_proj", Blocks("first", 2)))
    assert asked == [(tmp_path / "bf16", (wanted,))]
    rows = [" ".join(line.split()) for line in capsys.readouterr().out.splitlines()]
    assert {"quantized in int8 layers.0.up", "quantized in int4 layers.{0-1}.o"} <= {*rows}
    assert {"not quantized here", "in bf16 (keep) model.layers.0.mlp.down_proj"} <= {*rows}
