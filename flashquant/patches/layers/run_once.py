"""Parts of methods that run once, because of something that they set: `made_once` asks for them.

They are read from the source of a class:

    if self.table is None:                     class Rotary:
        self.table = self.weight[1:].float()       @cached_property
                                                   def table(self): return self.weight.cos()

Limits
1. A method that tests one thing and sets another is not seen, nor one without a source.
"""

from __future__ import annotations

import ast
import builtins
import functools
import inspect
import textwrap
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from types import FunctionType
from typing import Any

from torch import nn

# What runs before a first pass, or is flashquant's own business.
_EARLIER = frozenset(
    {"__init__", "load_weights", "weight_loader", "create_weights", "process_weights_after_loading"}
)


@dataclass(frozen=True)
class Block:
    """A part of a method that runs once, and what it sets on its module.

    Attributes:
        method: whose part it is.
        code: the statements; None for all of the method.
        sets: attributes of the module that come to hold something made, and whether that is
            written into what they hold already.
        reads: what is read to make it, as paths of attributes; a final `()` where it is called.
        calls: methods of the module that are called on the way.
        needs: local names that the statements do not set themselves.

    """

    method: FunctionType
    code: tuple[ast.stmt, ...] | None
    sets: Mapping[str, bool]
    reads: frozenset[str]
    calls: frozenset[str]
    needs: frozenset[str]

    def again(self) -> Callable[[nn.Module], object] | None:
        """What runs it once more, with nothing but its module; None if it needs more."""
        if self.code is None:
            alone = len(inspect.signature(self.method).parameters) == 1
            return self.method if alone else None
        if self.needs or any(isinstance(n, ast.Return) for s in self.code for n in ast.walk(s)):
            return None
        function = ast.parse("def again(self): pass").body[0]
        assert isinstance(function, ast.FunctionDef)
        function.body = list(self.code)
        module = ast.fix_missing_locations(ast.Module([function], []))
        scope: dict[str, Any] = {}
        code = compile(module, f"<{self.method.__qualname__}, once more>", "exec")
        exec(code, self.method.__globals__, scope)
        return scope["again"]  # type: ignore[no-any-return]


@functools.cache
def blocks(kind: type[nn.Module]) -> tuple[Block, ...]:
    """All of the methods and cached properties of a class."""
    return tuple(
        block
        for name in dir(kind)
        if name not in _EARLIER and (name == "forward" or not hasattr(nn.Module, name))
        for block in _blocks_of(inspect.getattr_static(kind, name))
    )


def read_by(method: FunctionType) -> Block | None:
    """All of a method, as a block that sets nothing; None where it has no source."""
    tree = _tree(method)
    return None if tree is None else Block(method, None, {}, *_reads(tree.body), frozenset())


def _blocks_of(member: object) -> Iterator[Block]:
    if isinstance(member, functools.cached_property):
        if isinstance(member.func, FunctionType) and (tree := _tree(member.func)) is not None:
            reads, calls = _reads(tree.body)
            yield Block(member.func, None, {tree.name: False}, reads, calls, frozenset())
        return
    method = inspect.unwrap(member) if callable(member) else None
    if isinstance(method, FunctionType) and (tree := _tree(method)) is not None:
        for node in ast.walk(tree):
            if isinstance(node, ast.If):
                yield from _block(method, tree, node)


def _block(method: FunctionType, tree: ast.FunctionDef, branch: ast.If) -> Iterator[Block]:
    """What a branch makes that it takes, or leaves, once: because of something that is set."""
    asks = _asked(branch.test)
    inside, all_set = _sets(branch.body), _sets(tree.body)
    if asks & (inside.keys() | _flags(branch.body)):
        reads, calls = _reads(branch.body)
        needs = _free(branch.body, method)
        for other in needs:
            more = _reads([n for n in ast.walk(tree) if _assigns(n, other)])
            reads, calls = reads | more[0], calls | more[1]
        yield Block(method, tuple(branch.body), inside, reads, calls, needs)
    elif isinstance(branch.body[-1], ast.Return) and asks & all_set.keys():
        sets = {name: in_place for name, in_place in all_set.items() if name in asks}
        yield Block(method, None, sets, *_reads(tree.body), frozenset())


def _asked(test: ast.expr) -> set[str]:
    """The attributes of the module that a condition asks about."""
    found = {n.attr for n in ast.walk(test) if isinstance(n, ast.Attribute) and _is_self(n.value)}
    for call in (n for n in ast.walk(test) if isinstance(n, ast.Call)):
        if isinstance(call.func, ast.Name) and call.func.id in ("hasattr", "getattr"):
            owner, name = call.args[:2]
            if _is_self(owner) and isinstance(name, ast.Constant):
                found.add(str(name.value))
    return found


def _sets(body: list[ast.stmt]) -> dict[str, bool]:
    """The attributes of the module that are set to what is computed, and whether in place."""
    found: dict[str, bool] = {}
    for node in (n for statement in body for n in ast.walk(statement)):
        if isinstance(node, ast.Assign | ast.AnnAssign) and not isinstance(
            node.value, ast.Constant | None
        ):
            found |= dict.fromkeys(_own(_targets(node)), False)
        elif isinstance(node, ast.Call) and isinstance(node.func, ast.Attribute):
            if node.func.attr == "copy_":
                found |= dict.fromkeys(_own([node.func.value]), True)
            elif node.func.attr == "register_buffer" and isinstance(node.args[0], ast.Constant):
                found[str(node.args[0].value)] = False
    return found


def _flags(body: list[ast.stmt]) -> set[str]:
    """The attributes of the module that are set to a constant."""
    return {
        name
        for node in (n for statement in body for n in ast.walk(statement))
        if isinstance(node, ast.Assign) and isinstance(node.value, ast.Constant)
        for name in _own(node.targets)
    }


def _targets(node: ast.Assign | ast.AnnAssign) -> list[ast.expr]:
    return node.targets if isinstance(node, ast.Assign) else [node.target]


def _own(targets: list[ast.expr]) -> Iterator[str]:
    """Those of these that are attributes of the module itself."""
    for target in targets:
        if isinstance(target, ast.Attribute) and _is_self(target.value):
            yield target.attr


def _reads(body: list[Any]) -> tuple[frozenset[str], frozenset[str]]:
    """Paths of attributes of the module that statements read, and its methods that they call."""
    paths, calls = set[str](), set[str]()
    nodes = [n for statement in body for n in ast.walk(statement)]
    parts = {id(n.value) for n in nodes if isinstance(n, ast.Attribute)}  # of longer paths
    for node in nodes:
        if isinstance(node, ast.Call) and (path := _path(node.func)):
            paths.add(f"{path}.()")
            if "." not in path:
                calls.add(path)
        elif isinstance(node, ast.Attribute) and id(node) not in parts:
            paths.add(_path(node))
    return frozenset(paths - {""}), frozenset(calls)


def _path(node: ast.expr) -> str:
    """`a.b` of `self.a.b`; empty for what is none of the module's."""
    steps: list[str] = []
    while isinstance(node, ast.Attribute):
        steps.append(node.attr)
        node = node.value
    return ".".join(reversed(steps)) if _is_self(node) else ""


def _free(body: list[ast.stmt], method: FunctionType) -> frozenset[str]:
    """Local names that statements read and do not set."""
    names = [n for s in body for n in ast.walk(s) if isinstance(n, ast.Name)]
    read = {n.id for n in names if isinstance(n.ctx, ast.Load)} - {"self"}
    own = {n.id for n in names if isinstance(n.ctx, ast.Store)}
    known = own | method.__globals__.keys() | (vars(builtins).keys() - {"super"})
    return frozenset(read - known)


def _assigns(node: ast.AST, name: str) -> bool:
    return isinstance(node, ast.Assign) and any(
        isinstance(n, ast.Name) and n.id == name for t in node.targets for n in ast.walk(t)
    )


def _is_self(node: ast.expr) -> bool:
    return isinstance(node, ast.Name) and node.id == "self"


@functools.cache
def _tree(method: FunctionType) -> ast.FunctionDef | None:
    try:
        tree = ast.parse(textwrap.dedent(inspect.getsource(method))).body[0]
    except (OSError, TypeError, SyntaxError):  # made by other code, as transformers' fused layers
        return None
    return tree if isinstance(tree, ast.FunctionDef) else None
