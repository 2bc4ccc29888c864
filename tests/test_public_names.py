"""The front door: what it offers, and what it does not import on the way."""

from __future__ import annotations

import inspect
import os
import subprocess
import sys
from types import ModuleType

import pytest

import flashquant
from flashquant import errors

LATER = {"ReloadReport", "Status", "errors"}  # imported when they are asked for
HEAVY = ("torch", "vllm", "numpy", "transformers")


def python(code: str, **environ: str) -> subprocess.CompletedProcess[str]:
    """Run code in a new interpreter, with FLASHRL_CONFIG only if it is given."""
    kept = {name: value for name, value in os.environ.items() if name != "FLASHRL_CONFIG"}
    return subprocess.run(
        [sys.executable, "-c", f"import sys\n{code}"],
        env=kept | environ,
        capture_output=True,
        text=True,
        timeout=120,
    )


def imported_by(code: str, **environ: str) -> set[str]:
    """Which heavy modules the code leaves behind."""
    done = python(f"{code}\nprint(*sys.modules)", **environ)
    assert done.returncode == 0, done.stderr
    return set(HEAVY) & set(done.stdout.split())


def test_all_is_what_is_there():
    public = {
        name
        for name, value in vars(flashquant).items()
        if not name.startswith("_")
        and not isinstance(value, ModuleType)
        and getattr(value, "__module__", None) in ("flashquant", "flashquant.api")
    }

    assert public | {"__version__", *LATER} == set(flashquant.__all__)


@pytest.mark.parametrize("name", flashquant.__all__)
def test_every_name_of_all_can_be_had(name):
    assert getattr(flashquant, name)


def test_all_is_sorted_and_says_each_name_once():
    assert flashquant.__all__ == sorted(set(flashquant.__all__))


def test_a_name_that_is_not_there_is_told():
    with pytest.raises(AttributeError, match="'flashquant' has no attribute 'pach'"):
        flashquant.pach  # noqa: B018


def test_the_version_is_that_of_the_distribution():
    from importlib.metadata import version

    assert flashquant.__version__ == version("flashquant")


@pytest.mark.parametrize(
    "code",
    [
        "import flashquant",
        "import flashquant; flashquant.patch_from_env()",
        "import flashquant; assert not flashquant.is_patched()",
        "import flashquant; flashquant.__version__",
        "import flashquant; flashquant.errors.ReloadError",
        "from flashquant import errors",
        "import flashquant; dir(flashquant)",
    ],
)
@pytest.mark.parametrize("environ", [{}, {"FLASHRL_CONFIG": ""}], ids=["unset", "empty"])
def test_without_a_configuration_neither_torch_nor_vllm_is_imported(code, environ):
    assert imported_by(code, **environ) == set()


def test_importing_flashquant_is_light_even_with_a_configuration():
    assert imported_by("import flashquant", FLASHRL_CONFIG="int8") == set()


def test_the_plugin_hook_is_an_entry_point_of_vllm():
    from importlib.metadata import entry_points

    (hook,) = entry_points(group="vllm.general_plugins", name="flashquant")

    assert hook.load() is flashquant.patch_from_env


@pytest.mark.parametrize("wrong", ["int9", " ", "runs/nothing.yaml"])
def test_a_misspelt_configuration_is_an_error_before_torch_is_imported(wrong):
    code = """
import flashquant
try:
    flashquant.patch_from_env()
except flashquant.errors.ConfigError as error:
    print("torch" in sys.modules, "vllm" in sys.modules, error)
"""
    done = python(code, FLASHRL_CONFIG=wrong)

    assert done.stdout.startswith("False False FLASHRL_CONFIG: "), done.stderr


def test_a_misspelt_configuration_says_the_nearest_name():
    done = python("import flashquant; flashquant.patch_from_env()", FLASHRL_CONFIG="int88")

    assert done.returncode == 1
    assert "ConfigError: FLASHRL_CONFIG" in done.stderr
    assert "'int8'" in done.stderr


def test_the_types_of_what_is_returned_are_those_that_are_returned():
    from flashquant.update import report, status

    assert flashquant.ReloadReport is report.ReloadReport
    assert flashquant.Status is status.Status
    assert flashquant.errors.ReloadError is errors.ReloadError


@pytest.mark.parametrize("name", sorted(set(flashquant.__all__) - LATER - {"__version__"}))
def test_help_is_complete_by_itself(name):
    """What it takes, returns and raises, and an example; no way to another page."""
    function = getattr(flashquant, name)
    said = inspect.getdoc(function)

    assert "Example:" in said
    assert "See `" not in said
    for argument in inspect.signature(function).parameters:
        assert f"\n    {argument}: " in said
    if inspect.signature(function).return_annotation != "None":
        assert "Returns:" in said


def test_help_names_every_error_of_an_update():
    said = flashquant.reload_weights.__doc__
    missing = [
        kind.__name__
        for kind in vars(errors).values()
        if isinstance(kind, type) and issubclass(kind, errors.ReloadError)
        if kind.__name__ not in said
    ]

    assert missing == []


@pytest.mark.parametrize(
    "command", [["-m", "flashquant"], ["-c", "from flashquant.cli.main import main; main()"]]
)
def test_the_command_says_its_version(command):
    done = subprocess.run([sys.executable, *command, "--version"], capture_output=True, text=True)

    assert (done.returncode, done.stdout) == (0, f"flashquant {flashquant.__version__}\n")
