"""Streams of a GPU that is not there, and whoever uses memory on two of them unordered.

Operations run on the host, one after another. What is followed is what a GPU would know of their
order: each stream by itself, what one was told to wait for, and what the host has waited for.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import pytest
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from flashquant.plan import storage_of, tensors_in, written_by

Clock = dict[str, int]  # how many operations of each stream are over by then


def later(one: Clock, other: Clock) -> Clock:
    return {name: max(one.get(name, 0), other.get(name, 0)) for name in one | other}


class StandInStream:
    """A stream, as far as torch's callers see one."""

    def __init__(self, name: str, streams: StandInStreams) -> None:
        self.name, self.clock = name, Clock()
        self._streams = streams

    def wait_stream(self, other: StandInStream) -> None:
        self.clock = later(self.clock, other.clock)

    def synchronize(self) -> None:
        self._streams.host = later(self._streams.host, self.clock)


class StandInStreams:
    """Those of one GPU."""

    def __init__(self) -> None:
        self.host = Clock()
        self.named: list[StandInStream] = []
        self.default = self.current = StandInStream("default", self)

    def new(self, name: str) -> StandInStream:
        self.named.append(stream := StandInStream(name, self))
        return stream

    @contextmanager
    def on(self, stream: StandInStream) -> Iterator[None]:
        before, self.current = self.current, stream
        try:
            yield
        finally:
            self.current = before

    def installed(self, monkeypatch: pytest.MonkeyPatch) -> StandInStreams:
        """What torch says of a GPU's streams from now on."""
        monkeypatch.setattr("torch.cuda.current_stream", lambda device=None: self.current)
        monkeypatch.setattr("torch.cuda.stream", self.on)
        return self


class Races(TorchDispatchMode):
    """Notes each operation that uses what another stream may be writing, or writes what one may
    be reading.

    Attributes:
        found: these, in order: the operation, and the streams of both.

    """

    def __init__(self, streams: StandInStreams) -> None:
        super().__init__()
        self.found: list[str] = []
        self._streams = streams
        self._wrote: dict[int, list[tuple[str, int]]] = {}
        self._read: dict[int, list[tuple[str, int]]] = {}
        self._kept: list[Any] = []  # an address is not used again

    def __torch_dispatch__(
        self, func: Any, types: Any, args: Any = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        kwargs = kwargs or {}
        result = func(*args, **kwargs)
        written = {storage_of(tensor) for tensor in written_by(func, args, kwargs)}
        shows = any(r.alias_info is not None and not written for r in func._schema.returns)
        if not shows and "empty" not in str(func):
            seen = [t for t in tensors_in((args, kwargs, [result])) if not t.is_meta]
            self._kept += [tensor.untyped_storage() for tensor in seen]
            made = {storage_of(tensor) for tensor in tensors_in([result])} | written
            here = {storage_of(tensor) for tensor in seen}
            self._note(str(func), here - made, here & made)
        if not isinstance(result, Tensor | tuple | list) and result is not None:
            self._streams.current.synchronize()  # a number on the host
        return result

    def _note(self, name: str, read: set[int], written: set[int]) -> None:
        stream = self._streams.current
        stream.clock = later(stream.clock, self._streams.host)
        now = stream.clock.get(stream.name, 0) + 1
        for storage in read | written:
            others = list(self._wrote.get(storage, ()))
            if storage in written:
                others += self._read.get(storage, ())
            self.found += [
                f"{name} on {stream.name} beside {other}"
                for other, when in others
                if other != stream.name and stream.clock.get(other, 0) < when
            ]
        stream.clock[stream.name] = now
        for storage in written:
            self._wrote.setdefault(storage, []).append((stream.name, now))
        for storage in read:
            self._read.setdefault(storage, []).append((stream.name, now))
