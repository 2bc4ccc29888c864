"""One step of the plan into one storage.

A `Stage` is one parameter of one layer in checkpoint format: real memory that
shards fill in any order, over as many calls as the trainer likes. It knows
which windows have arrived, so a half-arrived parameter is never mistaken for a
whole one, however often a shard is sent again.
"""

from __future__ import annotations

from collections.abc import Mapping
from collections.abc import Set as AbstractSet
from types import MappingProxyType

import torch
from torch import Tensor

from flashquant.plan import Fill, View, Write
from flashquant.update.undo import UndoLog


class Stage:
    """The memory in which one parameter waits until all of it has arrived."""

    def __init__(self, shape: torch.Size, stride: tuple[int, ...], dtype: torch.dtype) -> None:
        self._shape, self._stride, self._dtype = shape, stride, dtype
        self._memory: Tensor | None = None
        self._arrived: dict[View, Tensor | None] = {}
        self._elements = 0  # of these windows, which never overlap
        self._padding = 0
        self.numel = shape.numel()

    def blank(self) -> Stage:
        """One more of its form, in which nothing has arrived."""
        fresh = Stage(self._shape, self._stride, self._dtype)
        fresh._padding = self._padding
        return fresh

    def expect(self, elements: int) -> None:
        """Say how many elements tensors fill; the rest is padding, which is zero."""
        self._padding = max(0, self.numel - elements)

    @property
    def shape(self) -> torch.Size:
        return self._shape

    @property
    def nbytes(self) -> int:
        """Bytes this stage holds at the moment."""
        return 0 if self._memory is None else self._memory.nbytes

    @property
    def started(self) -> bool:
        return bool(self._arrived)

    @property
    def count(self) -> int:
        """How many windows have arrived."""
        return len(self._arrived)

    @property
    def windows(self) -> set[View]:
        """The windows that have arrived."""
        return set(self._arrived)

    @property
    def maxima(self) -> Mapping[View, Tensor | None]:
        """Each window that has arrived, and the row maxima of the whole tensor it is a part of."""
        return MappingProxyType(self._arrived)

    @property
    def complete(self) -> bool:
        """Whether every element has arrived that tensors fill."""
        return self._elements + self._padding >= self.numel

    def holds(self, view: View) -> bool:
        """Whether this window has arrived."""
        return view in self._arrived

    def memory(self, device: torch.device) -> Tensor:
        """The staged tensor, allocated at the first shard; later ones may come in another mode."""
        if self._memory is None:
            with torch.inference_mode(mode=False):
                self._memory = torch.empty_strided(
                    self._shape, self._stride, dtype=self._dtype, device=device
                )
            if self._padding:
                self._memory.zero_()
        return self._memory

    def adopt(self, memory: Tensor) -> None:
        """Stage in memory that is already there: the live parameter itself."""
        self._memory = memory

    def lies_in(self, memory: Tensor) -> bool:
        """Whether this is what it adopted."""
        return self._memory is memory

    def arrived(self, view: View, maxima: Tensor | None = None) -> None:
        if view not in self._arrived:
            self._elements += view.numel
        self._arrived[view] = maxima

    def remember(self, views: set[View], undo: UndoLog, *, values: bool) -> None:
        """Let an undo log keep windows that earlier pushes brought.

        Args:
            views: of those, the ones that have arrived are kept.
            undo: the log of the push that is about to consume or overwrite them.
            values: also copy what they hold, because it is about to be overwritten.

        """
        memory = self._memory
        mine = {view: maxima for view, maxima in self._arrived.items() if view in views}
        if not mine or memory is None:
            return
        copies = {view: view.into(memory).clone() for view in mine} if values else {}

        def bring_back() -> None:
            for view, old in copies.items():
                view.into(memory).copy_(old)
            self._memory = memory
            for view, maxima in mine.items():
                self.arrived(view, maxima)

        undo.remember_how(bring_back, live=False)

    def forget(self, view: View) -> None:
        """Treat one window as not sent: its call failed."""
        if view in self._arrived:
            del self._arrived[view]
            self._elements -= view.numel
        if not self._arrived:
            self._memory = None
            self._elements = 0

    def keep_only(self, mine: AbstractSet[View], undo: UndoLog) -> None:
        """Treat the other windows as not sent: they belong to an earlier sync.

        Args:
            mine: windows that the push under way brought.
            undo: its log.

        """
        others = self.windows - mine
        self.remember(others, undo, values=len(others) < len(self._arrived))
        for view in others:
            self.forget(view)

    @property
    def mask(self) -> Tensor:
        """Which elements have arrived, bool, of the shape of the parameter."""
        mask = torch.zeros(self._shape, dtype=torch.bool)
        flat = mask.view(-1).as_strided(self._shape, self._stride)
        for view in self._arrived:
            view.into(flat).fill_(True)
        return flat

    def fill_up(self, live: Tensor, device: torch.device) -> None:
        """Take what has not arrived from the live parameter, laid out as this one is."""
        if not self.lies_in(live):
            memory, rest = self.memory(device), live.detach().clone()
            for view in self._arrived:
                view.into(rest).copy_(view.into(memory))
            memory.copy_(rest)
        self._elements = self.numel

    def clear(self) -> None:
        """Free the memory; the layer has been committed."""
        self._arrived.clear()
        self._elements = 0
        self._memory = None


def write(
    step: Write | Fill,
    incoming: Tensor,
    stage: Stage,
    device: torch.device,
    maxima: Tensor | None = None,
) -> None:
    """Carry out one step: a window of `incoming`, or a constant, into the stage.

    `incoming` may be a view of a buffer that its owner reuses as soon as the
    push returns: nothing here keeps a reference to it. `maxima` are those of its
    rows, `[N, 1]`, for a stage that holds a shard of it.
    """
    window = step.target_view.into(stage.memory(device))
    if isinstance(step, Fill):
        window.fill_(step.value)
        maxima = torch.tensor([[abs(step.value)]], device="cpu")
    else:
        window.copy_(step.source_view.into(incoming))
    stage.arrived(step.target_view, maxima)
