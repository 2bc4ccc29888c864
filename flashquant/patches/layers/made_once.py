"""What modules make of their weights by themselves, once, and keep: it would go stale.

Found in the source of their classes, when nothing has been made yet. What is looked for is a
block that runs once, because of something that it sets itself, and that reads a parameter:

    if self.table is None:                     class Rotary:
        self.table = self.weight[1:].float()       @cached_property
                                                   def table(self): return self.weight.cos()

The same block runs again after an update, and what it makes is copied to where the old values are:
captured graphs hold the address. A block that needs more than its module cannot be run again; an
engine with such a module is refused when it starts.

What loaders make of the weights they have just loaded is not in a block of its own. It shows as
tensors that the checkpoint's load has left behind (`while_loaded`).

Limits
1. A method that tests one thing and sets another is not seen, nor one without a source.
2. Only modules are looked at: the methods and kernels of layers are the probe's business.
"""

from __future__ import annotations

import ast
import builtins
import functools
import inspect
import textwrap
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from types import FunctionType
from typing import Any

import torch
from torch import Tensor, nn

from flashquant.errors import ReloadError, UnsupportedEngine
from flashquant.patches.layers.attention import is_deferred_attention_layer
from flashquant.plan import storage_of
from flashquant.update import UndoLog

# What runs before a first pass, or is flashquant's own business.
_EARLIER = frozenset(
    {"__init__", "load_weights", "weight_loader", "create_weights", "process_weights_after_loading"}
)
# Of a parameter, but not of its values.
_FORM = frozenset(
    {"device", "dim", "dtype", "element_size", "is_cuda", "is_meta", "ndim", "numel", "shape"}
    | {"size", "stride"}
)
_UNMADE = object()


@dataclass(frozen=True)
class _Block:
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


@dataclass(frozen=True)
class MadeOnce:
    """Something that one module makes of its weights at its first pass, and keeps.

    Attributes:
        name: of the module in the model.
        module: it.
        attribute: of the module; holds nothing, or something old, before the first pass.
        in_place: whether the code writes into what the attribute holds already.
        again: runs the same code once more.

    """

    name: str
    module: nn.Module
    attribute: str
    in_place: bool
    again: Callable[[nn.Module], object]

    def make_anew(self, undo: UndoLog) -> None:
        """Bring what is kept up to date, where it is; nothing if nothing has been made yet.

        Raises:
            ReloadError: what is made now has another form.

        """
        old = self._held()
        if not isinstance(old, Tensor):
            return
        # A first pass runs in inference mode, and what it makes is written in no other.
        with torch.inference_mode():
            before = old.clone()
            undo.remember_how(functools.partial(self._put_back, old, before), nbytes=old.nbytes)
            if not self.in_place:
                self._hold(None)
            made = self.again(self.module)
        held = self._held()
        fresh = held if isinstance(held, Tensor) else made
        if not isinstance(fresh, Tensor) or _form(fresh) != _form(old):
            raise ReloadError(
                f"{self.name}.{self.attribute} ({type(self.module).__name__}) is made of weights, "
                "and has another form when it is made anew. Unset FLASHRL_CONFIG to serve this "
                "model unpatched, and please report it."
            )
        self._put_back(old, fresh)

    def _put_back(self, old: Tensor, values: Tensor) -> None:
        self._hold(old)
        if values is not old:
            with torch.inference_mode():
                old.copy_(values)

    def _held(self) -> object:
        return self._place.get(self.attribute)

    def _hold(self, value: Tensor | None) -> None:
        self._place[self.attribute] = value

    @property
    def _place(self) -> dict[str, Any]:
        buffers = self.module._buffers
        return buffers if self.attribute in buffers else vars(self.module)


def all_made_once(model: nn.Module) -> list[MadeOnce]:
    """Everything of this kind in a model that has made none of it yet.

    Raises:
        UnsupportedEngine: some of it could not be made anew after an update.

    """
    found = []
    for name, module in model.named_modules():
        for block in _blocks(type(module)):  # type: ignore[arg-type]  # types are hashable
            sets = [attribute for attribute in block.sets if _may_hold(module, attribute)]
            if sets and _reads_parameter(module, block, frozenset()):
                found += [_made_by(name, module, block, attribute) for attribute in sets]
        if hasattr(module, "populate_sink_kv"):
            raise UnsupportedEngine(
                f"{name} ({type(module).__name__}) writes keys and values that are weights into "
                "the KV cache, once, where they would go stale when new ones are pushed. Unset "
                "FLASHRL_CONFIG to serve this model unpatched."
            )
    return found


def _may_hold(module: nn.Module, attribute: str) -> bool:
    """Whether an attribute may be where a tensor is kept: it holds nothing yet, or one."""
    if attribute in module._parameters or attribute in module._modules:
        return False
    held = vars(module).get(attribute, module._buffers.get(attribute))
    return held is None or isinstance(held, Tensor)


def plain_tensors(model: nn.Module) -> dict[tuple[str, str], Tensor]:
    """The floats that modules hold beside parameters and buffers, by module and attribute.

    Not those of layers that vLLM processes, nor of attentions.
    """
    found: dict[tuple[str, str], Tensor] = {}
    for name, module in model.named_modules():
        if hasattr(module, "quant_method") or is_deferred_attention_layer(module):
            continue
        for attribute, value in vars(module).items():
            each = value if isinstance(value, list | tuple) else (value,)
            for index, tensor in enumerate(each):
                if isinstance(tensor, Tensor) and tensor.is_floating_point():
                    found[name, f"{attribute}[{index}]" if each is value else attribute] = tensor
    return found


def while_loaded(model: nn.Module, before: dict[tuple[str, str], Tensor]) -> list[str]:
    """What a loader has made of the weights and left in plain attributes, by name.

    Args:
        model: its checkpoint has just been loaded.
        before: its `plain_tensors` when it had just been created.

    """
    known = {storage_of(t) for t in (*model.parameters(), *model.buffers(), *before.values())}
    return [
        f"{name}.{attribute}" if name else attribute
        for (name, attribute), tensor in plain_tensors(model).items()
        if storage_of(tensor) not in known
    ]


@contextmanager
def attributes_kept(model: nn.Module) -> Iterator[None]:
    """While a loader is watched on meta tensors: whatever it sets on modules is taken back."""
    kept = [(module, dict(vars(module))) for module in model.modules()]
    try:
        yield
    finally:
        for module, attributes in kept:
            for attribute, value in attributes.items():
                if isinstance(value, Tensor | list | tuple):
                    object.__setattr__(module, attribute, value)


def _made_by(name: str, module: nn.Module, block: _Block, attribute: str) -> MadeOnce:
    again = _again(block)
    if again is None:
        raise UnsupportedEngine(
            f"{name} ({type(module).__name__}) makes {attribute!r} of its weights at its first "
            f"pass ({block.method.__qualname__}), out of more than it holds itself, and keeps it: "
            "it would go stale when new weights are pushed. Unset FLASHRL_CONFIG to serve this "
            "model unpatched, and please report it."
        )
    return MadeOnce(name, module, attribute, block.sets[attribute], again)


def _again(block: _Block) -> Callable[[nn.Module], object] | None:
    """What runs the block once more, with nothing but its module; None if it needs more."""
    if block.code is None:
        alone = len(inspect.signature(block.method).parameters) == 1
        return block.method if alone else None
    if block.needs or any(isinstance(n, ast.Return) for s in block.code for n in ast.walk(s)):
        return None
    function = ast.parse("def again(self): pass").body[0]
    assert isinstance(function, ast.FunctionDef)
    function.body = list(block.code)
    module = ast.fix_missing_locations(ast.Module([function], []))
    scope: dict[str, Any] = {}
    code = compile(module, f"<{block.method.__qualname__}, once more>", "exec")
    exec(code, block.method.__globals__, scope)
    return scope["again"]  # type: ignore[no-any-return]


def _reads_parameter(module: nn.Module, block: _Block, seen: frozenset[str]) -> bool:
    """Whether a block reads a parameter of its module, or of one inside it, or has one computed."""
    if any(_is_of_weights(module, path) for path in block.reads):
        return True
    for name in block.calls - seen:
        method = inspect.getattr_static(type(module), name, None)
        if isinstance(method, FunctionType) and (tree := _tree(method)) is not None:
            reads, calls = _reads(tree.body)
            inner = _Block(method, None, {}, reads, calls, frozenset())
            if _reads_parameter(module, inner, seen | {name}):
                return True
    return False


def _is_of_weights(module: nn.Module, path: str) -> bool:
    value: Any = module
    for step in path.split("."):
        if step == "()":
            return isinstance(value, nn.Module) and any(True for _ in value.parameters())
        if isinstance(value, nn.Parameter):
            return step not in _FORM
        if not isinstance(value, nn.Module):
            return False
        held = {**vars(value), **value._modules, **value._parameters}
        value = held.get(step, _UNMADE)
    return isinstance(value, nn.Parameter)


@functools.cache
def _blocks(kind: type[nn.Module]) -> tuple[_Block, ...]:
    return tuple(
        block
        for name in dir(kind)
        if name not in _EARLIER and (name == "forward" or not hasattr(nn.Module, name))
        for block in _blocks_of(inspect.getattr_static(kind, name))
    )


def _blocks_of(member: object) -> Iterator[_Block]:
    if isinstance(member, functools.cached_property):
        if isinstance(member.func, FunctionType) and (tree := _tree(member.func)) is not None:
            reads, calls = _reads(tree.body)
            yield _Block(member.func, None, {tree.name: False}, reads, calls, frozenset())
        return
    method = inspect.unwrap(member) if callable(member) else None
    if isinstance(method, FunctionType) and (tree := _tree(method)) is not None:
        for node in ast.walk(tree):
            if isinstance(node, ast.If):
                yield from _block(method, tree, node)


def _block(method: FunctionType, tree: ast.FunctionDef, branch: ast.If) -> Iterator[_Block]:
    """What a branch makes that it takes, or leaves, once: because of something that is set."""
    asks = _asked(branch.test)
    inside, all_set = _sets(branch.body), _sets(tree.body)
    if asks & (inside.keys() | _flags(branch.body)):
        reads, calls = _reads(branch.body)
        needs = _free(branch.body, method)
        for other in needs:
            more = _reads([n for n in ast.walk(tree) if _assigns(n, other)])
            reads, calls = reads | more[0], calls | more[1]
        yield _Block(method, tuple(branch.body), inside, reads, calls, needs)
    elif isinstance(branch.body[-1], ast.Return) and asks & all_set.keys():
        sets = {name: in_place for name, in_place in all_set.items() if name in asks}
        yield _Block(method, None, sets, *_reads(tree.body), frozenset())


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


def _form(tensor: Tensor) -> tuple[object, ...]:
    return tensor.shape, tensor.dtype, tensor.device
