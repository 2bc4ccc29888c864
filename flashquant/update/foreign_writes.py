"""Writes into live weights by anything but flashquant: reported, never put right in silence.

A `param.copy_(...)` into a live parameter comes by no door: nothing is quantized, checked
or counted. Two traces remain, and both are looked at:

    torch's version counter      of every parameter; before each forward pass, each update, and
                                 after each call that reaches the workers by RPC
    the bytes                    whenever digests are taken anyway: `param.data.copy_(...)` and a
                                 collective's receive leave no other trace
"""

from __future__ import annotations

import logging
import operator
from collections.abc import Collection, Iterable, Iterator, Mapping
from types import MappingProxyType

from torch import Tensor

from flashquant.update.wording import some_of

logger = logging.getLogger(__name__)

_VERSION = operator.attrgetter("_version")


class ForeignWrites:
    """Remembers how the live parameters of one model were left by its own updates.

    Args:
        live: layer -> its live parameters by full name.

    """

    def __init__(self, live: Mapping[str, Iterable[tuple[str, Tensor]]]) -> None:
        self._live = {
            layer: tuple(item for item in items if not item[1].is_inference())
            for layer, items in live.items()
        }
        self._flat = tuple(tensor for items in self._live.values() for _, tensor in items)
        self._known: tuple[int, ...] = ()  # the counters of all of them, as last looked at
        self._versions: dict[str, tuple[int, ...]] = {}
        self._digests: dict[str, str] = {}
        self._foreign: set[str] = set()
        self.rebase()

    @property
    def foreign(self) -> tuple[str, ...]:
        """The parameters another writer has modified since their layer was last updated."""
        return tuple(sorted(self._foreign))

    def look(self) -> None:
        """Compare the version counters with those that the last update left."""
        now_all = _versions(self._flat)
        if now_all == self._known:  # before every forward pass: nothing but this
            return
        self._known = now_all
        self._report({name for layer in self._live for name in self._written(layer)})

    def look_at(self, layer: str) -> None:
        """The same of one layer, which is about to be written."""
        self._report(set(self._written(layer)))

    def _written(self, layer: str) -> Iterator[str]:
        """The parameters of a layer whose counters have moved since they were last looked at."""
        items, before = self._live.get(layer, ()), self._versions.get(layer, ())
        now = _versions(tensor for _, tensor in items)
        if now != before:
            self._versions[layer] = now
            for (name, _), old, new in zip(items, before, now, strict=True):
                if old != new:
                    yield name

    def compare(self, digests: Mapping[str, str]) -> None:
        """Compare fresh digests with those of the last time, if no update came in between."""
        before = self._digests
        self._digests = {
            name: digests[name]
            for items in self._live.values()
            for name, _ in items
            if name in digests
        }
        self._report({name for name, now in self._digests.items() if before.get(name, now) != now})

    def settle(
        self,
        layers: Iterable[str],
        unsent: Mapping[str, Collection[str]] = MappingProxyType({}),
        sent: Collection[str] = (),
    ) -> None:
        """An update of flashquant's is committed, and has changed these layers.

        Args:
            layers: that went live.
            unsent: of those of which not everything was sent, the parameters that were not: what
                another writer left in them is still there.
            sent: the parameters that were.

        """
        self.rebase(layers := list(layers))
        for layer in layers:
            for name, _ in self._live.get(layer, ()):
                if name not in unsent.get(layer, ()):
                    self._digests.pop(name, None)  # what is derived from what was sent, too
                if layer not in unsent or name in sent:
                    self._foreign.discard(name)

    def forget(self) -> None:
        """The bytes are no longer what they were, and that is known."""
        self._digests.clear()

    def rebase(self, layers: Iterable[str] | None = None) -> None:
        """Their counters, or those of all, have moved by our own doing; the bytes stay as noted."""
        for layer in self._live if layers is None else layers:
            self._versions[layer] = _versions(tensor for _, tensor in self._live.get(layer, ()))

    def _report(self, found: set[str]) -> None:
        new = found - self._foreign
        self._foreign |= new
        if new:
            logger.error(
                "%d live parameters were modified outside flashquant (first %s): what they hold is "
                "not quantized, not checked, and not what a restart would serve. Push them by "
                "model.load_weights(...) or flashquant.reload_weights(...); one complete update "
                "puts all of them right.",
                len(new),
                some_of(sorted(new)),
            )


def _versions(tensors: Iterable[Tensor]) -> tuple[int, ...]:
    return tuple(map(_VERSION, tensors))
