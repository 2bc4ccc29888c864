"""Every way in which we make an update fail, at every place where it can.

in the stream   what the trainer sends is wrong, or its iterator raises
in a call       a function of flashquant raises at its n-th call of an update
by a signal     Ctrl-C, between any two lines
"""

from __future__ import annotations

import pkgutil
import signal
import sys
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from types import FrameType
from typing import Any
from unittest import mock

import torch
from torch import Tensor

import flashquant

SEED = 20261123
INJECTED: Counter[str] = Counter()  # by engine; printed in pytest's summary

Pairs = list[tuple[str, Tensor]]
Stream = Iterator[tuple[str, Any]]

_SOURCES = str(Path(flashquant.__file__).parent)
_ERRORS = (MemoryError, KeyboardInterrupt, RuntimeError)


def _raising(error: type[BaseException]) -> Callable[[Pairs, int], Stream]:
    def stream(pairs: Pairs, index: int) -> Stream:
        yield from pairs[:index]
        raise error("injected")

    return stream


def _replacing(change: Callable[[str, Tensor], tuple[str, Any]]) -> Callable[[Pairs, int], Stream]:
    def stream(pairs: Pairs, index: int) -> Stream:
        yield from pairs[:index]
        yield change(*pairs[index])
        yield from pairs[index + 1 :]

    return stream


def _holding(value: float) -> Callable[[str, Tensor], tuple[str, Tensor]]:
    def change(name: str, tensor: Tensor) -> tuple[str, Tensor]:
        changed = tensor.clone()
        changed.view(-1)[-1] = value
        return name, changed

    return change


def _duplicate(pairs: Pairs, index: int) -> Stream:
    yield from pairs[: index + 1]
    yield pairs[index // 2]


def _missing(pairs: Pairs, index: int) -> Stream:
    yield from pairs[:index]
    yield from pairs[index + 1 :]


STREAMS: dict[str, Callable[[Pairs, int], Stream]] = {
    "the iterator raises RuntimeError": _raising(RuntimeError),
    "the iterator raises MemoryError": _raising(MemoryError),
    "the iterator raises KeyboardInterrupt": _raising(KeyboardInterrupt),
    "the iterator raises SystemExit": _raising(SystemExit),
    "NaN": _replacing(_holding(float("nan"))),
    "infinite": _replacing(_holding(float("-inf"))),
    "a row too many": _replacing(lambda name, t: (name, torch.cat([t, t[:1]]))),
    "int64": _replacing(lambda name, t: (name, t.long())),
    "float64": _replacing(lambda name, t: (name, t.double())),
    "meta": _replacing(lambda name, t: (name, t.to("meta"))),
    "no tensor": _replacing(lambda name, t: (name, None)),
    "an unknown name": _replacing(lambda name, t: (f"{name}_", t)),
    "twice": _duplicate,
    "missing": _missing,
}

# Where an update allocates, computes or writes: a function, and whether it fails
# before it has done its work, or after.
CALLS = (
    ("flashquant.update.pipeline.as_stored", "before"),
    ("flashquant.update.reserve.Copies.of", "before"),
    ("flashquant.update.undo.UndoLog.remember", "after"),
    ("flashquant.update.undo.UndoLog.remember_how", "after"),
    ("flashquant.update.staging.Stage.memory", "before"),
    ("flashquant.patches.layers.base.write", "after"),
    ("flashquant.patches.layers.processed.digests", "after"),
    ("flashquant.patches.layers.processed.LiveLayer.commit", "before"),
    ("flashquant.patches.layers.processed.LiveLayer.commit", "after"),
    ("flashquant.patches.layers.blueprint.LayerBlueprint.build", "after"),
    ("flashquant.patches.layers.base.StagedLayer.window", "after"),
    ("flashquant.patches.layers.in_place.DirectLayer.move_in", "after"),
    ("flashquant.patches.layers.in_place.DirectLayer._bring_home", "after"),
    ("flashquant.update.in_place.check_peak", "before"),
    ("flashquant.update.in_place.InPlaceWrite.take", "after"),
    ("flashquant.patches.layers.in_place.DirectLayer.commit", "before"),
    ("flashquant.patches.layers.in_place.DirectLayer.commit", "after"),
    ("flashquant.patches.layers.per_tensor.LateLayer.commit", "before"),
    ("flashquant.patches.layers.per_tensor.LateLayer.commit", "after"),
    ("flashquant.patches.layers.kernel_state.Carry.add", "before"),
    ("flashquant.patches.layers.kernel_state.Carry.apply", "after"),
    ("flashquant.patches.layers.kernel_state._overwrite", "after"),
    ("flashquant.patches.layers.kernel_state._pointers", "before"),
    ("flashquant.update.pipeline.check_unmoved", "before"),
)


@contextmanager
def counted(path: str) -> Iterator[Callable[[], int]]:
    """Count the calls of a function while the block runs."""
    calls = [0]
    with _wrapped(path, lambda: calls.__setitem__(0, calls[0] + 1), "before"):
        yield lambda: calls[0]


@contextmanager
def failing(path: str, at: int, when: str) -> Iterator[None]:
    """Let one call of a function raise: the one with this number, and no other."""
    left = [at]

    def strike() -> None:
        left[0] -= 1
        if left[0] == -1:
            raise _ERRORS[at % len(_ERRORS)]("injected")

    with _wrapped(path, strike, when):
        yield


@contextmanager
def _wrapped(path: str, strike: Callable[[], None], when: str) -> Iterator[None]:
    original = pkgutil.resolve_name(path)

    def wrapper(*args: Any, **kwargs: Any) -> Any:
        if when == "before":
            strike()
        result = original(*args, **kwargs)
        if when == "after":
            strike()
        return result

    with mock.patch(path, wrapper):
        yield


def lines(call: Callable[[], object]) -> int:
    """How many lines of flashquant run in a call."""
    seen = [0]
    _traced(call, lambda: seen.__setitem__(0, seen[0] + 1))
    return seen[0]


def interrupted(call: Callable[[], object], line: int) -> None:
    """Run a call, with a real SIGINT before the n-th line of flashquant that runs in it."""
    left = [line]

    def strike() -> None:
        left[0] -= 1
        if left[0] == -1:
            signal.raise_signal(signal.SIGINT)

    _traced(call, strike)


def _traced(call: Callable[[], object], on_line: Callable[[], None]) -> None:
    def enter(frame: FrameType, event: str, arg: Any) -> Any:
        return look if frame.f_code.co_filename.startswith(_SOURCES) else None

    def look(frame: FrameType, event: str, arg: Any) -> Any:
        if event == "line":
            on_line()
        return look

    before = sys.gettrace()
    sys.settrace(enter)
    try:
        call()
    finally:
        sys.settrace(before)
