"""What is wrong with a configuration file, in words for the person who wrote it."""

from __future__ import annotations

import difflib
import reprlib
from collections.abc import Iterable, Mapping, Sequence
from types import MappingProxyType
from typing import TYPE_CHECKING, Final

if TYPE_CHECKING:
    from pydantic import BaseModel, ValidationError
    from pydantic_core import ErrorDetails

    # Whose keys they are, by the number of keys above them, and what it is called.
    Holders = Sequence[tuple[str, type[BaseModel]]]

_MAX_PROBLEMS: Final = 8
_SHOWN: Final = 60  # characters of a value that an error repeats
_SHOULD_BE: Final[Mapping[str, str]] = MappingProxyType(
    {
        "bool_type": "must be true or false",
        "invalid_key": "a key must be text; put it in quotes",
        "model_type": "must be a mapping; write it as lines of `key: value`",
        "string_type": "must be text; put it in quotes if YAML reads it as something else",
        "tuple_type": "must be a list; write it as [first, second]",
    }
)
"""pydantic's type of an error -> what the value should be, and how to write it."""


def sentences(error: ValidationError, source: str, holders: Holders) -> list[str]:
    """Each problem of a file."""
    problems = error.errors(include_url=False)
    # A misspelt `configs` is one mistake, though pydantic also misses the right spelling.
    problems = [problem for problem in problems if problem["type"] != "missing"] or problems
    lines = [_sentence(problem, source, holders) for problem in problems[:_MAX_PROBLEMS]]
    if len(problems) > _MAX_PROBLEMS:
        lines.append(f"{source}: and {len(problems) - _MAX_PROBLEMS} problems more")
    return lines


def _sentence(problem: ErrorDetails, source: str, holders: Holders) -> str:
    """`file, where: what is, what should be`."""
    loc, kind, value = problem["loc"], problem["type"], problem["input"]
    found = "is empty"
    if value is not None:
        found = f"is {reprlib.repr(value)[:_SHOWN]} ({type(value).__name__})"
    if kind == "value_error":
        return f"{place(source, loc)}: {problem['ctx']['error']}"
    if kind == "literal_error":
        words = problem["ctx"]["expected"].replace("'", "")
        return f"{place(source, loc)}: {found}, but must be {words}"
    if kind == "missing":
        return f"{source}: has no key 'configs'; put the entries in a list under it"
    if kind == "extra_forbidden":
        *parents, key = loc
        holder, model = holders[sum(isinstance(part, str) for part in parents)]
        entry, entries = holders[1]
        one_too_high = not parents and key in entries.model_fields
        hint = f"it is one of {entry}, of which `configs` is a list"
        return (
            f"{place(source, parents)}: {key!r} is not a key of {holder}; "
            f"{hint if one_too_high else nearest(str(key), model.model_fields)}"
        )
    return f"{place(source, loc)}: {found}, but {_SHOULD_BE.get(kind, problem['msg'])}"


def place(source: str, loc: Iterable[int | str]) -> str:
    """`runs/mixed.yaml, configs[1].fn` from ("configs", 1, "fn")."""
    path = "".join(f"[{step}]" if isinstance(step, int) else f".{step}" for step in loc)
    return f"{source}, {path.lstrip('.')}" if path else source


def nearest(word: str, known: Iterable[str]) -> str:
    near = difflib.get_close_matches(word.lower(), known, n=1)
    return f"did you mean {near[0]!r}?" if near else f"known: {listed(known)}"


def listed(names: Iterable[str]) -> str:
    return ", ".join(sorted(names))
