"""`keep` of an entry: which modules of a checkpoint stay in bf16; `overrides`: in another scheme.

    keep: ["*.down_proj"]            a glob on the names of modules; `*` crosses dots
    keep: [model.layers.0]           a module, and everything in it
    keep: [lm_head, router, vision]  words: the head, what chooses experts, the vision tower
    keep: [{first: 2}, {last: 1}]    blocks of the language model, from either end
    overrides: [{match: "*.down_proj", fn: fp8_channel}]    the same four, under `match`

Names are those of the checkpoint, which are those that a trainer pushes: `q_proj`, not vLLM's
fused `qkv_proj`. This room knows names and nothing else; `patches.kept` gets them, and holds
vLLM to what was asked.
"""

from __future__ import annotations

import difflib
import fnmatch
import re
import reprlib
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass
from types import MappingProxyType
from typing import Final, Literal

from flashquant.errors import ConfigError

_SIGHT: Final = ("vision", "visual")  # in the name of a tower, whoever wrote the model
_BLOCK: Final = re.compile(r"(.*?)\.(\d+)(?:\.|$)")
_SHOWN: Final = 3


@dataclass(frozen=True)
class Blocks:
    """Blocks of the language model.

    Attributes:
        end: from which they are counted.
        count: how many.

    """

    end: Literal["first", "last"]
    count: int

    def __str__(self) -> str:
        return f"{{{self.end}: {self.count}}}"


Kept = str | Blocks


def read_kept(written: object) -> Kept:
    """One element of `keep`, as YAML holds it.

    Raises:
        ValueError: it is neither a name nor a number of blocks.

    """
    if isinstance(written, Blocks):
        return written
    if isinstance(written, str) and written.strip():
        return written.strip()
    if isinstance(written, Mapping) and len(written) == 1:
        ((end, count),) = written.items()
        if end in ("first", "last") and type(count) is int and count > 0:
            return Blocks(end, count)
    raise ValueError(
        f"holds {reprlib.repr(written)}; write a name or a glob such as '*.down_proj', one of the "
        f"words {', '.join(WORDS)}, or {{first: N}} or {{last: N}} with N from 1"
    )


def kept_modules(
    keep: Iterable[Kept], tensors: Iterable[str], depth: int | None = None
) -> tuple[str, ...]:
    """The modules of a checkpoint that an entry keeps, in the order of their names.

    Args:
        keep: of the entry.
        tensors: every name in the checkpoint.
        depth: how many blocks the language model has, where its configuration says so; what a
            checkpoint holds beyond them (layers that predict further tokens) is no block of it.

    Raises:
        ConfigError: one of them matches nothing; says what is near.

    """
    modules = modules_of(tensors)
    kept: set[str] = set()
    for one in keep:
        kept |= _found("keep", one, modules, depth)
    return tuple(sorted(kept))


def overridden_modules(
    overrides: Iterable[tuple[Kept, str]],
    tensors: Iterable[str],
    kept: Iterable[str] = (),
    depth: int | None = None,
) -> dict[str, str]:
    """The modules of a checkpoint that an entry has in another scheme, and in which.

    Args:
        overrides: what each of them matches, and its scheme.
        tensors: every name in the checkpoint.
        kept: modules that stay in bf16, whatever matches them.
        depth: as for `kept_modules`.

    Raises:
        ConfigError: one of them matches nothing, or what another one matches.

    """
    modules, in_bf16 = modules_of(tensors), set(kept)
    chosen: dict[str, str] = {}
    by: dict[str, Kept] = {}
    for match, scheme in overrides:
        found = sorted(_found("overrides", match, modules, depth) - in_bf16)
        if not found:
            raise ConfigError(
                f"overrides: all that {str(match)!r} matches stays in bf16 by `keep`. Leave one of "
                "the two out."
            )
        if twice := next((module for module in found if module in by), None):
            raise ConfigError(
                f"overrides: {str(by[twice])!r} and {str(match)!r} both match {twice}. Write them "
                "so that a module is matched once."
            )
        by |= dict.fromkeys(found, match)
        chosen |= dict.fromkeys(found, scheme)
    return chosen


def modules_of(tensors: Iterable[str]) -> tuple[str, ...]:
    """The modules that hold these tensors: `mlp.up_proj` of `mlp.up_proj.weight`."""
    return tuple(dict.fromkeys(name.rpartition(".")[0] or name for name in tensors))


def nearest(wanted: str, modules: Iterable[str]) -> str:
    """What the names of a checkpoint have that looks like this one, as a part of a sentence."""
    kinds = dict.fromkeys(re.sub(r"\.\d+(?=\.|$)", ".*", module) for module in modules)
    last = wanted.rpartition(".")[2].strip("*")
    ends: dict[str, str] = {}
    for kind in kinds:
        ends.setdefault(kind.rpartition(".")[2], kind)
    near = [ends[end] for end in difflib.get_close_matches(last, ends, n=_SHOWN)]
    near += difflib.get_close_matches(wanted, kinds, n=_SHOWN, cutoff=0.5)
    found = list(dict.fromkeys(near))[:_SHOWN] or [*kinds][:_SHOWN]
    return ("the nearest are " if near else "it has ") + ", ".join(found)


def _found(key: str, one: Kept, modules: tuple[str, ...], depth: int | None) -> set[str]:
    """The modules that one element of an entry's key stands for."""
    if isinstance(one, Blocks):
        return _blocks(key, one, modules, depth)
    return WORDS[one](key, modules) if one in WORDS else _named(key, one, modules)


def _named(key: str, pattern: str, modules: tuple[str, ...]) -> set[str]:
    found = {
        module
        for module in modules
        if any(fnmatch.fnmatchcase(part, pattern) for part in with_parents(module))
    }
    if not found:
        raise ConfigError(
            f"{key}: {pattern!r} matches no module of the checkpoint; {nearest(pattern, modules)}. "
            "Write names as the checkpoint has them, without `.weight`."
        )
    return found


def with_parents(module: str) -> Iterator[str]:
    """A module, and all that it is in."""
    while module:
        yield module
        module = module.rpartition(".")[0]


def _heads(_: str, modules: tuple[str, ...]) -> set[str]:
    """May be none: a head that is tied to the embeddings has no name of its own."""
    return {module for module in modules if module.rpartition(".")[2] == "lm_head"}


def _routers(key: str, modules: tuple[str, ...]) -> set[str]:
    """Whatever stands right beside experts; norms among it are never quantized anyway."""
    blocks = {m.partition(".experts")[0] for m in modules if ".experts" in m}
    found = {module for module in modules if module.rpartition(".")[0] in blocks}
    found -= {module for module in found if module.endswith(".experts")}
    if not found:
        raise ConfigError(
            f"{key}: 'router' stands for what is beside the experts of a block, and no module of "
            "the checkpoint is. Leave it out, or write names."
        )
    return found


def _sight(key: str, modules: tuple[str, ...]) -> set[str]:
    found = {module for module in modules if _sees(module)}
    if not found:
        raise ConfigError(
            f"{key}: 'vision' stands for modules with {' or '.join(_SIGHT)} in their name, and the "
            f"checkpoint has none; it begins with {modules[0] if modules else 'nothing'}. Write a "
            "glob on its names."
        )
    return found


def _sees(module: str) -> bool:
    return any(word in module for word in _SIGHT)


def _blocks(key: str, wanted: Blocks, modules: tuple[str, ...], depth: int | None) -> set[str]:
    """Of the list of modules that holds most: that of the language model, towers aside."""
    lists: dict[str, dict[int, list[str]]] = {}
    for module in modules:
        if not _sees(module) and (found := _BLOCK.match(module)):
            lists.setdefault(found[1], {}).setdefault(int(found[2]), []).append(module)
    blocks = max(lists.values(), key=lambda by: sum(map(len, by.values())), default={})
    order = sorted(blocks)[:depth]
    if wanted.count > len(order):
        raise ConfigError(
            f"{key}: {wanted} is more than the {len(order)} blocks of the checkpoint. Write at "
            "most as many."
        )
    chosen = order[: wanted.count] if wanted.end == "first" else order[-wanted.count :]
    return {module for index in chosen for module in blocks[index]}


WORDS: Final[Mapping[str, Callable[[str, tuple[str, ...]], set[str]]]] = MappingProxyType(
    {"lm_head": _heads, "router": _routers, "vision": _sight}
)
"""What may be written instead of names, and which modules it stands for; the key is for errors."""
