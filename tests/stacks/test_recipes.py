"""The recipes: every setting is the stack's, and what FLASHRL_CONFIG names is found.

What a shell makes of a script and its environment is handed to the stack's own configuration;
nothing is trained. The files on the Hub are served from this machine, in FlashRL's form.
"""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

from tests.stacks import overlays
from tests.stacks.running import run
from tests.support.hub import hub

FOLDER = overlays.ROOT / "examples" / "skyrl"
FILES = sorted(FOLDER.glob("*.env"))
REPOS = (
    "LiyuanLucasLiu/Qwen2.5-0.5B-Instruct-quantized.w8a8-RedHatAI",
    "LiyuanLucasLiu/Qwen2.5-32B-quantized.w8a8",
)
FLASHRL_FILE = (
    b"configs:\n- fn: int8\n  model: org/model-w8a8\n  profile: org/profiles/profile.pt\n"
)


def expanded(stack: str, file: Path) -> list[str]:
    """The overrides as the stack would get them."""
    script = overlays.ROOT / "examples" / stack / "dapo_gsm8k.sh"
    stub = 'python3() { printf "%s\\n" "${@:3}"; }; source "$@"'
    return subprocess.run(
        ["bash", "-c", stub, "bash", str(script), str(file)],
        check=True,
        capture_output=True,
        text=True,
    ).stdout.splitlines()


def scheme_of(file: Path) -> str:
    (line,) = (n for n in file.read_text().splitlines() if n.startswith("FLASHRL_CONFIG="))
    return line.partition("=")[2]


def test_there_is_a_recipe_for_each_model_and_scheme() -> None:
    assert {file.stem for file in FILES} == {
        "qwen2.5-0.5b-int8",
        "qwen2.5-0.5b-fp8",
        "qwen2.5-1.5b-int8",
        "qwen2.5-1.5b-fp8",
        "qwen2.5-32b-int8",
    }


@pytest.mark.parametrize("file", FILES, ids=lambda file: file.stem)
@pytest.mark.parametrize(
    "stack", [pytest.param(stack, marks=overlays.needed(stack)) for stack in ("skyrl", "verl")]
)
def test_a_stack_knows_every_setting_of_a_recipe(stack: str, file: Path, tmp_path: Path) -> None:
    settings = expanded(stack, file)
    plain, misspelt = tmp_path / "plain.sh", tmp_path / "misspelt.sh"
    plain.write_text("".join(f"  {setting}\n" for setting in settings))
    misspelt.write_text(plain.read_text().replace("clip", "klip"))

    answer = run(stack, "settings", stack, plain, scheme="")
    wrong = run(stack, "settings", stack, misspelt, scheme="")

    assert answer["refused"] == []
    assert len(answer["found"]) == len(settings)
    assert wrong["refused"]


@pytest.mark.parametrize("file", FILES, ids=lambda file: file.stem)
def test_the_configuration_of_a_recipe_resolves(file: Path, tmp_path: Path) -> None:
    """In a process of its own, as in a worker."""
    served = {repo: {"main": {"flashrl_config.yaml": FLASHRL_FILE}} for repo in REPOS}
    load = (
        "import sys; from flashquant.config.schema import load_config; "
        "c = load_config(sys.argv[1]); "
    )
    show = "sys.stdout.write(f'{c.configs[0].scheme} {c.configs[0].profile}')"
    with hub(served) as at:
        said = subprocess.run(
            [sys.executable, "-c", load + show, scheme_of(file)],
            cwd=overlays.ROOT,
            env={"HF_ENDPOINT": at.url, "HF_HOME": str(tmp_path), "PATH": "/usr/bin:/bin"},
            check=True,
            capture_output=True,
            text=True,
        ).stdout

    profile = "org/profiles/profile.pt" if "/" in scheme_of(file) else "None"
    assert said == f"{'fp8_vllm' if 'fp8' in file.stem else 'int8'} {profile}"
