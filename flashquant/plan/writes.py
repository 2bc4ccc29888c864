"""The write plan: where every element the trainer sends must land.

A plan is made once per name, from one watched run of the engine's own loader,
and replayed at every push. It is plain data: names, shapes, strides and
offsets, no tensors and no engine, so it can be printed, compared and tested on
a laptop.

    q_proj.weight (256, 256)  ->  qkv_proj.weight @ 0      stride (256, 1)
    k_proj.weight (128, 256)  ->  qkv_proj.weight @ 65536  stride (256, 1)
"""

from __future__ import annotations

import functools
import math
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor

from flashquant.errors import ReloadError


class View(NamedTuple):
    """A strided window, as `torch.as_strided` takes it; units are elements."""

    shape: tuple[int, ...]
    stride: tuple[int, ...]
    offset: int

    @property
    def numel(self) -> int:
        return math.prod(self.shape)

    @property
    def is_dense(self) -> bool:
        """Whether its elements lie one after another, as those of a contiguous tensor do."""
        expected = 1
        for size, step in zip(reversed(self.shape), reversed(self.stride), strict=True):
            if size != 1 and step != expected:
                return False
            expected *= size
        return True

    @classmethod
    def of(cls, tensor: Tensor, *, start: int = 0) -> View:
        """The window `tensor` is, counted from element `start` of its storage."""
        return cls(tuple(tensor.shape), tensor.stride(), int(tensor.storage_offset()) - start)

    def into(self, tensor: Tensor) -> Tensor:
        """This window of `tensor`, counted from where the tensor itself starts.

        A bucket slice and a loose tensor differ only in where they start, so
        counting from the tensor makes one plan serve both.
        """
        return tensor.as_strided(self.shape, self.stride, tensor.storage_offset() + self.offset)


@dataclass(frozen=True)
class Write:
    """Copy one window of one incoming tensor into one window of one parameter."""

    source: str
    source_view: View  # counted from the start of the incoming tensor
    target: str
    target_view: View  # counted from the start of the parameter


@dataclass(frozen=True)
class Fill:
    """Set one window of one parameter to a constant, as loaders do with padding."""

    target: str
    target_view: View
    value: float


@dataclass(frozen=True)
class Replay:
    """Let the engine's own loader write this window: it does more than copy.

    The trace saw `reason` (an operation that is not a view or a `copy_`), so the
    loader runs for real, on staged memory, every time this tensor arrives.
    """

    source: str
    target: str
    target_view: View
    reason: str


Step = Write | Fill | Replay


@dataclass(frozen=True)
class TensorPlan:
    """Everything one incoming tensor causes.

    `shape` and `dtype` are those of the tensor when it was traced. A plan
    without steps belongs to a name that the engine's loader drops on purpose
    (a tied `lm_head.weight`, for example).
    """

    name: str
    shape: tuple[int, ...]
    dtype: torch.dtype
    steps: tuple[Step, ...]

    @property
    def numel(self) -> int:
        return math.prod(self.shape)

    @functools.cached_property
    def targets(self) -> tuple[str, ...]:
        return tuple(dict.fromkeys(step.target for step in self.steps))

    @functools.cached_property
    def needs_loader(self) -> bool:
        return any(isinstance(step, Replay) for step in self.steps)

    @functools.cached_property
    def turns_rows(self) -> bool:
        """Whether the rows of the tensor become columns: its last two dimensions are exchanged."""
        writes = (step for step in self.steps if isinstance(step, Write))
        return any(
            (write.source_view.stride[-1] == 1) != (write.target_view.stride[-1] == 1)
            for write in writes
            if len(write.target_view.shape) > 1 and write.target_view.shape[-1] > 1
        )


def beside(name: str, codes: TensorPlan) -> TensorPlan:
    """The plan of the scales `[N, 1]` of a weight `[N, K]`: a scale goes where its row went.

    Of experts `[E, N, K]` they are `[E, N, 1]`. Of a weight that the loader transposes, `[K, N]`
    or `[E, K, N]`, the rows are those that come out.

    Args:
        name: of the scales.
        codes: the plan of the weight.

    Raises:
        ReloadError: its loader does something else than to put rows, or parts of them, somewhere.

    """
    *experts, first, second = codes.shape
    return TensorPlan(
        name,
        (*experts, second if codes.turns_rows else first, 1),
        torch.float32,
        tuple(_scale_step(name, codes, step) for step in codes.steps),
    )


def _scale_step(name: str, codes: TensorPlan, step: Step) -> Write:
    views = (step.source_view, step.target_view) if isinstance(step, Write) else ()
    if views and len(codes.shape) == 3 and _has_whole_rows(views[1]):
        turned = _column_by_column(views[0], codes.shape)
        if turned is not None or _has_whole_rows(views[0]):
            source = turned or _row_by_row(views[0])
            return Write(name, source, f"{step.target}_scale", _row_by_row(views[1]))
    if not views or any(len(view.shape) != 2 or 1 not in view.stride for view in views):
        raise ReloadError(
            f"the engine's loader does more with {codes.name} than to put rows somewhere, so there "
            "is no place for its scales. Please report this model."
        )
    source, target = (View((v.shape[0], 1), (1, 1), _first_row(v)) for v in views)
    return Write(name, source, f"{step.target}_scale", target)


def _has_whole_rows(window: View) -> bool:
    """Whether a window of stacked matrices is made of parts of their rows."""
    *outer, last = window.stride
    return len(outer) > 0 and last == 1 and all(stride % outer[-1] == 0 for stride in outer)


def _row_by_row(window: View) -> View:
    """The same window of what has one element a row."""
    row = window.stride[-2]
    strides = tuple(stride // row for stride in window.stride[:-1])
    return View((*window.shape[:-1], 1), (*strides, 1), window.offset // row)


def _column_by_column(window: View, shape: tuple[int, ...]) -> View | None:
    """A window of transposed matrices `[E, K, N]`, of what has one element a column, `[E, N, 1]`.

    None where the window holds no parts of their columns.
    """
    *_, inner, columns = shape
    matrix = inner * columns
    *experts, column, last = window.stride
    if (column, last) != (1, columns) or any(stride % matrix for stride in experts):
        return None
    strides = tuple(stride // inner for stride in experts)
    expert, place = divmod(window.offset, matrix)
    return View((*window.shape[:-1], 1), (*strides, 1, 1), expert * columns + place % columns)


def _first_row(window: View) -> int:
    """Of a window of a matrix, or of a transposed one."""
    row, column = window.stride
    return window.offset // row if column == 1 else window.offset % column


def elements_of(plans: Iterable[TensorPlan]) -> dict[str, int]:
    """How many elements of each parameter these fill, of those that only windows are written to."""
    windows: dict[str, set[View]] = {}
    replayed: set[str] = set()
    for step in (step for plan in plans for step in plan.steps):
        if isinstance(step, Replay):
            replayed.add(step.target)
        else:
            windows.setdefault(step.target, set()).add(step.target_view)
    return {t: sum(v.numel for v in w) for t, w in windows.items() if t not in replayed}


class WritePlan:
    """The plans of all names seen so far, in the order in which they were first seen."""

    def __init__(self, entries: Iterable[TensorPlan] = ()) -> None:
        self._entries = {entry.name: entry for entry in entries}

    def __contains__(self, name: str) -> bool:
        return name in self._entries

    def __getitem__(self, name: str) -> TensorPlan:
        return self._entries[name]

    def __len__(self) -> int:
        return len(self._entries)

    def __eq__(self, other: object) -> bool:
        return isinstance(other, WritePlan) and self._entries == other._entries

    __hash__ = None  # type: ignore[assignment]  # mutable, like the dict inside

    @property
    def names(self) -> tuple[str, ...]:
        return tuple(self._entries)

    def add(self, entries: Mapping[str, TensorPlan]) -> None:
        self._entries.update(entries)

    def __str__(self) -> str:
        return "\n".join(line for entry in self._entries.values() for line in _lines(entry))


def _lines(entry: TensorPlan) -> list[str]:
    if not entry.steps:
        return [f"{entry.name} {entry.shape}  ->  dropped by the engine's loader"]
    return [
        f"{entry.name} {entry.shape}  ->  {step.target} @ {step.target_view.offset} "
        f"shape {step.target_view.shape} stride {step.target_view.stride} "
        f"({type(step).__name__.lower()})"
        for step in entry.steps
    ]
