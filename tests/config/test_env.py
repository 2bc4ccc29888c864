"""One place for every environment variable: its parser, its words, its table."""

from __future__ import annotations

import ast
from collections.abc import Iterator
from pathlib import Path

import pytest

import flashquant
from flashquant.config import env
from flashquant.config.env import VARIABLES, Variable
from flashquant.errors import ConfigError
from tools import environment

PACKAGE = Path(flashquant.__file__).parent
SWITCHES = [variable for variable in VARIABLES if isinstance(variable.default, bool)]


@pytest.mark.parametrize("switch", SWITCHES, ids=lambda variable: variable.name)
@pytest.mark.parametrize("yes", ["1", "yes", "true", "on", "ON", "True", " 1 "])
def test_every_switch_knows_every_yes(switch: Variable[bool], yes: str) -> None:
    assert switch.read({switch.name: yes}) is True


@pytest.mark.parametrize("switch", SWITCHES, ids=lambda variable: variable.name)
@pytest.mark.parametrize("no", ["0", "no", "false", "off", "OFF", "No"])
def test_every_switch_knows_every_no(switch: Variable[bool], no: str) -> None:
    assert switch.read({switch.name: no}) is False


@pytest.mark.parametrize("variable", VARIABLES, ids=lambda variable: variable.name)
def test_unset_and_empty_mean_the_default(variable: Variable[object]) -> None:
    assert variable.read({}) == variable.read({variable.name: ""}) == variable.default


@pytest.mark.parametrize(
    ("variable", "said", "should_be"),
    [
        *((switch, "maybe", "set it to 1 or 0") for switch in SWITCHES),
        (env.BRACKET_TIMEOUT, "-1", "or to 0 to wait for ever"),
        (env.BRACKET_TIMEOUT, "nan", "is no number of seconds"),
        (env.LOGGING_LEVEL, "LOUD", "set it to one of"),
        (env.RANK, "first", "a whole number from 0 on"),
        (env.DP_RANK, "-1", "a whole number from 0 on"),
    ],
)
def test_what_cannot_be_is_refused_with_what_should_be(
    variable: Variable[object], said: str, should_be: str
) -> None:
    with pytest.raises(ConfigError) as refused:
        variable.read({variable.name: said})

    assert str(refused.value).startswith(f"{variable.name}={said!r} is n")
    assert should_be in str(refused.value)


@pytest.mark.parametrize("variable", [v for v in VARIABLES if v.ours and v.parse is not str])
def test_a_process_that_is_to_be_patched_refuses_every_wrong_variable(
    variable: Variable[object], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Before anything is patched: that vLLM is imported would be seen by its import."""
    monkeypatch.setenv("FLASHRL_CONFIG", "int8")
    monkeypatch.setenv(variable.name, "?")
    monkeypatch.setattr(flashquant, "patch", lambda: pytest.fail("it was patched"))

    with pytest.raises(ConfigError, match=variable.name):
        flashquant.patch_from_env()


def _read_elsewhere(tree: ast.AST) -> Iterator[str]:
    """The names that are looked up in an environment one by one: `environ.get("X")`."""
    for node in ast.walk(tree):
        match node:
            case ast.Call(
                func=ast.Attribute(value=where, attr="get"), args=[ast.Constant(name), *_]
            ):
                pass
            case ast.Call(
                func=ast.Attribute(attr="getenv") as where, args=[ast.Constant(name), *_]
            ):
                yield str(name)
                continue
            case ast.Subscript(value=where, slice=ast.Constant(name), ctx=ast.Load()):
                pass
            case ast.Compare(left=ast.Constant(name), ops=[ast.In()], comparators=[where]):
                pass
            case _:
                continue
        if ast.unparse(where).endswith("environ"):
            yield str(name)


@pytest.mark.parametrize("way", ['os.environ.get("A")', 'environ["A"]', '"A" in environ'])
def test_a_variable_that_is_read_by_itself_would_be_seen(way: str) -> None:
    assert list(_read_elsewhere(ast.parse(way))) == ["A"]


def test_no_other_file_reads_a_variable_by_itself() -> None:
    found = {
        (str(file.relative_to(PACKAGE)), name)
        for file in PACKAGE.rglob("*.py")
        for name in _read_elsewhere(ast.parse(file.read_text()))
    }

    assert found == set()


def test_the_page_has_the_table_as_it_is() -> None:
    page = environment.PAGE.read_text()

    assert page == environment.written(page), "run: python -m tools.environment"
    assert all(f"`{variable.name}`" in page for variable in VARIABLES)
