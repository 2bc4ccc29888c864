"""Every command that a page shows is one: its own parser takes it, and no other is written.

Nothing is run. Where a command is somebody else's, it is said below how it is checked.
"""

from __future__ import annotations

import importlib.util
import json
import re
import subprocess
import sys
from collections.abc import Callable
from functools import cache

import pytest

from flashquant.config import env
from flashquant.config.schema import load_config
from flashquant.errors import ConfigError
from tests.docs import pages
from tests.docs.pages import ROOT, Block, Command

# Each page's settings of a stack are those of its example, which `tests/stacks` holds to the stack.
EXAMPLES = {
    "verl.trainer.main_ppo": "verl.sh",
    "skyrl.train.entrypoints.main_base": "skyrl.sh",
    "openrlhf.cli.train_ppo_ray": "openrlhf.sh",
}
# Programs of a machine, and a script of the reader's own.
PLAIN = {"cd", "curl", "eval", "mkdir", "tar", "train.py"}
# They take no options, or pytest's.
WITHOUT_PARSER = {"tools.idea", "tools.readme", "tools.environment", "tools.gpu.suite", "pytest"}
# vLLM's, which it reads when a server starts, or OpenMP's, or a variable of the Makefile's.
OTHERS = {"VLLM_SERVER_DEV_MODE", "OMP_NUM_THREADS"}
# The ones that only the tests read.
OF_TESTS = {"FLASHQUANT_PRETEND_ISA", "FLASHQUANT_TEST_VISION"}

COMMANDS = [one for block in pages.of("bash", "console") for one in pages.commands(block)]
STARTS = re.compile(r"(?:[A-Z_]+=\S+ )*(?:flashquant|python3? -m|make) (?!\.\.\.|serves|\()\S")
MENTIONED = [
    one
    for span in pages.spans()
    if STARTS.match(span.text)
    for one in pages.commands(Block(span.page, span.line, "span", re.sub(r"[][]", "", span.text)))
]

WRONG = [
    *pages.commands(
        Block(
            "wrong",
            1,
            "bash",
            """\
make tset
make test ARGS=1
flashquant doctor --gpus
flashquant doktor
flashquant profile make --kw
python -m benchmarks.deltas
python -m benchmarks.delta --step 5x
python -m pytest tests/tus
vllm serve ... --weight-transfer-configs '{}'
FLASHRL_CONFIG=int88 python train.py
FLASHQUANT_UNDO=kache python train.py
FLASHQUANT_UNDOO=cache python train.py
python3 -m verl.trainer.main_ppo actor_rollout_ref.rollout.nam=vllm
pip install flashquant  # it is not on PyPI
flash-quant doctor
""",
        )
    )
]


def module_of(command: Command) -> tuple[str, ...]:
    """The module that Python would run, and its arguments; nothing, if it is no Python."""
    match command.words:
        case ("flashquant", *rest):
            return ("flashquant", *rest)
        case ("python" | "python3", "-m", *rest):
            return tuple(rest)
        case ("vllm", *rest):
            return ("vllm.entrypoints.cli.main", *("MODEL" if w == "..." else w for w in rest))
    return ()


def is_parsed(command: Command) -> bool:
    module = module_of(command)[:1]
    return bool(module) and module[0] not in WITHOUT_PARSER | EXAMPLES.keys()


@cache
def refusals() -> dict[tuple[str, ...], str | None]:
    """What parsers say; all of them are asked in one process, which imports vLLM once."""
    asked = sorted({module_of(one) for one in COMMANDS + MENTIONED + WRONG if is_parsed(one)})
    missing = {one for one in asked if importlib.util.find_spec(one[0]) is None}
    known = [one for one in asked if one not in missing]
    done = subprocess.run(
        [sys.executable, "-m", "tests.docs.programs.parsing"],
        cwd=ROOT,
        input=json.dumps(known),
        capture_output=True,
        text=True,
        timeout=300,
    )
    assert done.returncode == 0, done.stderr[-4000:]
    said = json.loads(done.stdout)
    return dict(zip(known, said, strict=True)) | dict.fromkeys(missing, "there is no such module")


def check(command: Command) -> None:
    """Refuse a command that would not do what its page says.

    Raises:
        AssertionError: it is none, or its parser refuses it.

    """
    for name, value in command.variables:
        check_variable(name, value)
    match command.words:
        case ():
            return
        case ("make", *rest):
            check_make(*rest)
        case ("pip", "install", *rest):
            assert [w for w in rest if w not in ("-e", ".", "/path/to/flashquant")] == []
        case ("uv", "add", "--no-sync", "/path/to/flashquant"):
            return
        case ("ray", "job", "submit", "--runtime-env-json", json_text, "--", *rest):
            for name, value in json.loads(json_text)["env_vars"].items():
                check_variable(name, value)
            check(Command(command.where, tuple(rest)))
        case ("python" | "python3", "-m", module, *rest) if module in EXAMPLES:
            check_stack(EXAMPLES[module], rest)
        case ("swift", *rest):
            check_stack("ms_swift.sh", [word for word in rest if word != "..."])
        case ("python" | "python3", "-m", "pytest" | "tools.gpu.suite", *rest):
            assert [w for w in rest if w.startswith("tests/") and not (ROOT / w).exists()] == []
            assert {w for w in rest if w.startswith("-")} <= {"-m", "-k"}
        case ("python" | "python3", "-m", module) if module in WITHOUT_PARSER:
            assert importlib.util.find_spec(module)
        case ("python", script):
            assert script in PLAIN
        case (script,) if "/" in script:
            assert (ROOT / script).is_file()
        case _ if is_parsed(command):
            said = refusals()[module_of(command)]
            if said and not is_cut_short(command, said):
                pytest.fail(said)
        case (first, *_):
            assert first in PLAIN, f"{first} is no command that this test knows"


def is_cut_short(command: Command, said: str) -> bool:
    """Whether a sentence names options that there are, without what else the command wants."""
    options = {word for word in command.words if word.startswith("--")}
    given = command.where.language == "span" and "are required" in said
    return given and options <= set(re.findall(r"--[\w-]+", said))


def check_variable(name: str, value: str) -> None:
    variables = {variable.name for variable in env.VARIABLES}
    assert name in variables | OTHERS | OF_TESTS | set(makefile()[1]), f"nobody reads {name}"
    if name == "FLASHRL_CONFIG" and not value.endswith(".yaml"):
        load_config(value)
    if name in variables:
        env.check({name: value})


@cache
def makefile() -> tuple[list[str], list[str]]:
    """Its targets, and what it lets be set."""
    text = (ROOT / "Makefile").read_text()
    return re.findall(r"^([a-z]+):", text, re.M), re.findall(r"\$\(([A-Z_]+)\)", text)


def check_make(*words: str) -> None:
    targets, variables = makefile()
    for word in words:
        name, given, _ = word.partition("=")
        assert name in (variables if given else targets), f"the Makefile has no {name}"


def check_stack(example: str, words: list[str]) -> None:
    file = ROOT / "examples" / example
    shown = {
        word
        for command in pages.commands(Block(example, 1, "bash", file.read_text()))
        for word in command.words
    }
    assert [word for word in words if word not in shown] == [], f"not in {file}"


def described(commands: list[Command]) -> Callable[[Callable[..., None]], pytest.MarkDecorator]:
    return pytest.mark.parametrize("command", commands, ids=str)


@described(COMMANDS)
def test_a_command_of_a_block_is_taken_by_its_own_parser(command: Command) -> None:
    check(command)


@described(MENTIONED)
def test_a_command_of_a_sentence_is_taken_by_its_own_parser(command: Command) -> None:
    check(command)


@described(WRONG)
def test_a_wrong_command_would_be_refused(command: Command) -> None:
    with pytest.raises((AssertionError, ConfigError, pytest.fail.Exception)):
        check(command)
