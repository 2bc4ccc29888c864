"""Which commands are refused by their own parser of arguments; none of them is run.

Usage: python -m tests.docs.programs.parsing < COMMANDS
Reads and prints JSON: of each `[module, argument, ...]` what its parser says against it, or null.
A module has to have one: whatever it does after parsing does not happen.
"""

from __future__ import annotations

import argparse
import contextlib
import importlib.metadata
import importlib.util
import io
import json
import runpy
import sys
from typing import Any, NoReturn
from unittest import mock

# What an example imports, and does not use before it has parsed its arguments.
_STACKS = ("datasets", "trl")


class _Parsed(BaseException):
    """The arguments are good."""


_parse = argparse.ArgumentParser.parse_args


def _parse_only(self: Any, *arguments: Any, **named: Any) -> NoReturn:
    _parse(self, *arguments, **named)
    raise _Parsed


def refusal(module: str, arguments: list[str]) -> str | None:
    """What the parser of a module says against these arguments."""
    said = io.StringIO()
    sys.argv = [module, *arguments]
    try:
        with contextlib.redirect_stderr(said), contextlib.redirect_stdout(said):
            runpy.run_module(module, run_name="__main__", alter_sys=True)
    except _Parsed:
        return None
    except SystemExit as ended:
        return said.getvalue() if ended.code else None  # 0: --version
    except Exception as failure:  # whatever it is, the test says it
        return repr(failure)
    return "has parsed no arguments"


if __name__ == "__main__":
    missing = [name for name in _STACKS if importlib.util.find_spec(name) is None]
    sys.modules.update({name: mock.MagicMock() for name in missing})
    # vLLM's command asks for its version; the distribution for CPUs has another name.
    version = importlib.metadata.version
    importlib.metadata.version = lambda name: "0+cpu" if name == "vllm" else version(name)
    argparse.ArgumentParser.parse_args = _parse_only  # type: ignore[method-assign]
    result = [refusal(module, arguments) for module, *arguments in json.load(sys.stdin)]
    json.dump(result, sys.stdout)
