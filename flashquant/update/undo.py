"""What it takes to put the old weights back.

An undo log is filled by whoever is about to overwrite something, and either
played backwards or thrown away. It keeps copies, in host memory or in the KV cache: the bytes that
the kernels read (one byte a weight in an 8-bit scheme), never the bf16 source.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterator

from torch import Tensor

from flashquant.update.reserve import Borrowed, Copies, Reserve


class UndoLog:
    """The old values of one transaction, oldest first.

    Every step says how something was, not what to do to what is there now: so it
    may be played whether or not the change it answers came about, and twice.

    With `keep=False` nothing is remembered: the caller has chosen memory over
    the way back, and `can_restore` says so.

    Attributes:
        bytes: memory that the copies took, in bytes; stays after `forget`. Of what lives on a GPU,
            that is all the memory that was pinned for it.
        cache_bytes: of these, in the KV cache.
        touched: whether live weights have been, or were about to be, overwritten.

    """

    def __init__(
        self, *, keep: bool = True, borrows: bool = True, reserve: Reserve | None = None
    ) -> None:
        """Args:
        keep: whether there is to be a way back.
        borrows: whether no step runs before it is over, so that what is lent may be used.
        reserve: memory for the copies; of its own if not given.

        """
        self._keep, self._borrows = keep, borrows
        self._reserve = reserve = reserve or Reserve()
        self._copies, self._pinned = Copies(reserve), Copies(reserve, pinned=True)
        self._borrowed: Borrowed | None = None  # once something was lent, and was needed
        self._steps: list[Callable[[], object]] = []
        self._held: list[object] = []
        self._held_bytes = 0  # of what actions hold themselves
        self.touched = False

    @property
    def bytes(self) -> int:
        copied = self._copies.nbytes + self._pinned.nbytes
        return copied + self._held_bytes + self.cache_bytes

    @property
    def cache_bytes(self) -> int:
        return 0 if self._borrowed is None else self._borrowed.nbytes

    @property
    def can_restore(self) -> bool:
        """Whether playing the log would bring the old weights back."""
        return self._keep or not self.touched

    def remember(self, live: Tensor, *, soon: bool = True) -> None:
        """Note the present value of a tensor that is about to be overwritten.

        Args:
            live: the tensor.
            soon: right away; else `touch` will say when.

        """
        self.touched |= soon
        if not self._keep:
            return
        for part, copies in self._places(live.detach()):
            self._steps.append(functools.partial(part.copy_, copies.of(part)))

    def _places(self, live: Tensor) -> Iterator[tuple[Tensor, Copies]]:
        """The parts of a tensor, and where each is kept: a layer's cache may be smaller than it."""
        lent = self._reserve.lent if self._borrows else ()
        if lent and lent[0].device == live.device:
            if self._borrowed is None:
                self._borrowed = Borrowed(lent)
            live = live if live.dim() else live.view(1)
            dim = max(range(live.dim()), key=live.stride)  # parts of what is dense are dense
            while live.numel() and (rows := self._borrowed.rows_for(live, dim)):
                yield live.narrow(dim, 0, rows), self._borrowed
                live = live.narrow(dim, rows, live.shape[dim] - rows)
        if live.numel():
            yield live, self._copies if live.device.type == "cpu" else self._pinned

    def hold(self, value: object) -> None:
        """Keep something alive as long as the log: to free it takes time, which may be dear now."""
        self._held.append(value)

    def touch(self) -> None:
        """What has been remembered is overwritten from now on."""
        self.touched = True

    def remember_how(
        self, undo: Callable[[], object], *, live: bool = True, nbytes: int = 0
    ) -> None:
        """Note an action that reverses the one about to be taken, on live weights or staged.

        Args:
            undo: sets things to how they are now; harmless where they still are.
            live: whether it is live weights that are about to change.
            nbytes: what the action holds of them.

        """
        self.touched = self.touched or live
        if self._keep:
            self._steps.append(undo)
            self._held_bytes += nbytes

    def restore(self) -> None:
        """Play the log backwards; a second call plays what the first could not."""
        while self._steps:
            self._steps[-1]()
            self._steps.pop()
        self._free()

    def forget(self) -> None:
        """The transaction is committed: free what was kept."""
        self._steps.clear()
        self._held.clear()
        self._free()

    def _free(self) -> None:
        self._copies.free()
        self._pinned.free()
        if self._borrowed is not None:
            self._borrowed.free()
