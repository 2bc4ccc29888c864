"""Where a function stands in the sources of one vLLM, and its text; nothing is imported."""

from __future__ import annotations

import ast
import difflib
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

_DEFINED = (ast.FunctionDef, ast.AsyncFunctionDef, ast.ClassDef)


@dataclass(frozen=True)
class Sources:
    """The folder that holds the package `vllm`."""

    root: Path

    def of(self, target: str) -> str | None:
        """The text of a seam such as `vllm.a.b:Class.name`; None where it is not defined there."""
        module, _, path = target.partition(":")
        file = self._file(module)
        if file is None:
            return None
        text = file.read_text()
        node: ast.AST = ast.parse(text)
        for name in path.split("."):
            found = [child for child in _definitions(node) if child.name == name]
            if not found:
                return None
            node = found[-1]
        return ast.get_source_segment(text, node)

    def elsewhere(self, target: str) -> Iterator[str]:
        """Where else the last two names of a seam are defined: it may have moved there."""
        *_, last = target.partition(":")[2].split(".")
        owners = target.partition(":")[2].split(".")[:-1]
        for file in sorted(self.root.joinpath("vllm").rglob("*.py")):
            text = file.read_text()
            if f"def {last}(" in text:
                yield from self._places(file, text, last, owners)

    def _places(self, file: Path, text: str, name: str, owners: list[str]) -> Iterator[str]:
        module = ".".join(file.relative_to(self.root).with_suffix("").parts)
        tree = ast.parse(text)
        for outer in (tree, *_definitions(tree)):
            if any(inner.name == name for inner in _definitions(outer)):
                owner = f"{outer.name}." if isinstance(outer, _DEFINED) else ""
                # A method of another class is another function, unless the class was renamed.
                if not owners or owner in ("", f"{owners[-1]}."):
                    yield f"{module}:{owner}{name}"

    def _file(self, module: str) -> Path | None:
        folder = self.root.joinpath(*module.split("."))
        candidates = (folder.with_suffix(".py"), folder / "__init__.py")
        return next((file for file in candidates if file.exists()), None)


def _definitions(
    node: ast.AST,
) -> Iterator[ast.FunctionDef | ast.AsyncFunctionDef | ast.ClassDef]:
    """Functions and classes right inside a node, also under an `if` or a `try`."""
    for child in ast.iter_child_nodes(node):
        if isinstance(child, _DEFINED):
            yield child
        elif isinstance(child, (ast.If, ast.Try, ast.ExceptHandler, ast.With)):
            yield from _definitions(child)


def difference(target: str, old: Sources, new: Sources) -> str:
    """What another version does at a seam, as a unified diff; empty where it does the same."""
    before, after = old.of(target), new.of(target)
    if before is None or after is None or before == after:
        return ""
    lines = difflib.unified_diff(
        before.splitlines(), after.splitlines(), f"{target} before", f"{target} now", lineterm=""
    )
    return "\n".join(lines)
