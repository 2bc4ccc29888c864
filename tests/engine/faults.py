"""Every way in which we make an update fail, at every place where it can.

in the stream   what the trainer sends is wrong, or its iterator raises
in a call       a function of flashquant raises at its n-th call of an update
by a signal     Ctrl-C, between any two lines
"""

from __future__ import annotations

import signal
import sys
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path
from types import FrameType
from typing import Any
from unittest import mock

import torch
from torch import Tensor

import flashquant
from flashquant.patches.layers import (
    Carry,
    InPlaceLayer,
    LayerBlueprint,
    LiveLayer,
    PerTensorLayer,
    ProcessedLayer,
    base,
    kernel_state,
    packed_digests,
)
from flashquant.update import Stage, UndoLog, in_place, pipeline, proofs
from flashquant.update.in_place import InPlaceWrite
from flashquant.update.reserve import Borrowed, Copies
from tests.engine.serving import Serving
from tools.models.policies import Policies

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


@dataclass(frozen=True)
class Point:
    """A function that an update calls, where it is looked up, and where it is made to fail.

    Attributes:
        owner: the module or class in which callers find it.
        function: itself, so that a new name, or another place, breaks the import of this file.
        when: whether it fails before it has done its work, or after.

    """

    owner: Any
    function: Callable[..., Any]
    when: str

    def __post_init__(self) -> None:
        if getattr(self.owner, self.name) is not self.function:
            raise ValueError(f"callers of {self.name} do not find {self.function} in {self.owner}")

    @property
    def name(self) -> str:
        return self.function.__name__

    def __str__(self) -> str:
        return f"{self.owner.__name__}.{self.name}, {self.when}"


# Where an update allocates, computes or writes.
CALLS = (
    Point(pipeline, pipeline.as_stored, "before"),
    Point(Copies, Copies.of, "before"),
    Point(Borrowed, Borrowed.of, "before"),
    Point(Borrowed, Borrowed.rows_for, "after"),
    Point(UndoLog, UndoLog.remember, "after"),
    Point(UndoLog, UndoLog.remember_how, "after"),
    Point(Stage, Stage.memory, "before"),
    Point(base, base.write, "after"),
    Point(packed_digests, packed_digests.digests, "after"),
    Point(ProcessedLayer, ProcessedLayer.commit, "before"),
    Point(ProcessedLayer, ProcessedLayer.commit, "after"),
    Point(LayerBlueprint, LayerBlueprint.build, "after"),
    Point(LiveLayer, LiveLayer.window, "after"),
    Point(InPlaceLayer, InPlaceLayer.move_in, "after"),
    Point(InPlaceLayer, InPlaceLayer._copy_home, "after"),
    Point(in_place, in_place.check_peak, "before"),
    Point(InPlaceWrite, InPlaceWrite.take, "after"),
    Point(InPlaceLayer, InPlaceLayer.commit, "before"),
    Point(InPlaceLayer, InPlaceLayer.commit, "after"),
    Point(PerTensorLayer, PerTensorLayer.commit, "before"),
    Point(PerTensorLayer, PerTensorLayer.commit, "after"),
    Point(Carry, Carry.add, "before"),
    Point(Carry, Carry.apply, "after"),
    Point(kernel_state, kernel_state._overwrite, "after"),
    Point(kernel_state, kernel_state._pointers, "before"),
    Point(proofs, proofs.check_unmoved, "before"),
)


def spread(count: int, most: int) -> list[int]:
    """Some of so many calls or tensors, from the first to the last; of one alone, the middle."""
    if most == 1:
        return [count // 2][:count]
    most = min(count, most)
    return sorted({round(step * (count - 1) / max(most - 1, 1)) for step in range(most)})


def thrown_at(name: str, live: Serving, fresh: Serving, policies: Policies, each: int) -> list[str]:
    """Fail updates of an engine everywhere, each followed by a good one; what was wrong.

    Args:
        name: of the engine, for the report; faults of one without a name are not counted.
        live: serves policy A, before and after.
        fresh: was started on policy B.
        policies: theirs.
        each: so many places of each fault.

    """
    pushed = {policy: list(policies.tensors(policy).items()) for policy in "ab"}
    right = {"a": live.start.digest, "b": fresh.start.digest}
    wrong: list[str] = []
    serves, other = "a", "b"

    def reload(weights: Pairs | Stream) -> None:
        flashquant.reload_weights(live.llm, weights)

    def throw(what: str, call: Callable[[], object]) -> None:
        nonlocal serves, other
        if name:
            INJECTED[name] += 1
        try:
            call()
        except (Exception, KeyboardInterrupt, SystemExit):
            pass
        else:
            wrong.append(f"{what}: nothing was raised")
        if flashquant.status(live.llm).digest != right[serves]:
            wrong.append(f"{what}: not the old policy")
        reload(pushed[other])
        serves, other = other, serves
        if flashquant.status(live.llm).digest != right[serves]:
            wrong.append(f"{what}: the next update does not equal a fresh start")

    for kind, stream in STREAMS.items():
        for index in spread(len(pushed["a"]), each):
            spoiled = stream(pushed[other], index)
            throw(f"{kind} at {index}", lambda spoiled=spoiled: reload(spoiled))
    for point, number in _called(lambda: reload(pushed[serves]), each):

        def fail(point: Point = point, number: int = number) -> None:
            with failing(point, number):
                reload(pushed[other])

        throw(f"{point}, call {number}", fail)
    reload(pushed["a"])
    return wrong


def _called(call: Callable[[], object], each: int) -> Iterator[tuple[Point, int]]:
    """Every function that a good update calls, and some of its calls."""
    for when in ("before", "after"):  # one wrapper around a function at a time
        points = [point for point in CALLS if point.when == when]
        with ExitStack() as stack:
            counts = [stack.enter_context(counted(point)) for point in points]
            call()
        for point, count in zip(points, counts, strict=True):
            yield from ((point, number) for number in spread(count(), each))


@contextmanager
def counted(point: Point) -> Iterator[Callable[[], int]]:
    """Count the calls of a function while the block runs."""
    calls = [0]
    with _wrapped(point, lambda: calls.__setitem__(0, calls[0] + 1)):
        yield lambda: calls[0]


@contextmanager
def failing(point: Point, at: int) -> Iterator[None]:
    """Let one call of a function raise: the one with this number, and no other."""

    def strike() -> None:
        raise _ERRORS[at % len(_ERRORS)]("injected")

    with struck(point, at, strike):
        yield


@contextmanager
def struck(point: Point, at: int, strike: Callable[[], None]) -> Iterator[Callable[[], bool]]:
    """Let something happen at one call of a function; yields whether it has been reached."""
    left = [at]

    def count() -> None:
        left[0] -= 1
        if left[0] == -1:
            strike()

    with _wrapped(point, count):
        yield lambda: left[0] < 0


@contextmanager
def _wrapped(point: Point, strike: Callable[[], None]) -> Iterator[None]:
    def wrapper(*args: Any, **kwargs: Any) -> Any:
        if point.when == "before":
            strike()
        result = point.function(*args, **kwargs)
        if point.when == "after":
            strike()
        return result

    with mock.patch.object(point.owner, point.name, wrapper):
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
