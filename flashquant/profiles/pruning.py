"""FlashRL's `int8_prune`: a channel that no layer reads any more is silenced in its norm.

Where the codes of a column are zeros in every layer that reads a norm, what the norm puts there
changes no product, but may still be the largest activation of a token, and so coarsen the scale
of all others. Its weight is set to zero.

FlashRL holds the whole model at once for this. Here the norm is written when it arrives, and
again when the last of its readers has: in any order, over any number of pushes.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping
from collections.abc import Set as AbstractSet
from typing import Final, Protocol

import torch
from torch import Tensor

from flashquant.errors import ProfileError
from flashquant.profiles.profile import Entry

_BLOCK: Final = re.compile(r"^.*?\.\d+\.")
_ONE: Final = 1e-4  # how near to it the product of two reciprocals has to be


class Undo(Protocol):
    """The undo log of an update, as far as what is remembered here needs one."""

    def remember_how(self, undo: Callable[[], object], *, live: bool = True) -> None: ...


class Pruning:
    """Which channels of each norm are dead, as far as codes have arrived.

    Args:
        entries: of the profile; a norm and its readers are those with reciprocal factors.

    Raises:
        ProfileError: a layer could be the reader of several norms.

    """

    def __init__(self, entries: Mapping[str, Entry]) -> None:
        self._norm_of = _norms_of_readers(entries)
        self._readers: dict[str, set[str]] = {}
        for reader, norm in self._norm_of.items():
            self._readers.setdefault(norm, set()).add(reader)
        self._norms: dict[str, Tensor] = {}  # as they would be stored without pruning
        self._dead: dict[str, Tensor] = {}  # `[K]` bool, by reader
        self._masks: dict[str, Tensor] = {}  # `[K]` bool, by norm: what it was last written with
        self._arrived: dict[str, frozenset[str]] = {}  # of its readers, since then

    def remember(self, undo: Undo) -> None:
        """Let an undo log put back what is known now."""
        norms, dead = dict(self._norms), dict(self._dead)
        masks, arrived = dict(self._masks), dict(self._arrived)

        def bring_back() -> None:
            self._norms, self._dead = dict(norms), dict(dead)
            self._masks, self._arrived = dict(masks), dict(arrived)

        undo.remember_how(bring_back, live=False)

    def forget(self) -> None:
        """The weights are about to be lost: what is known of them is learned from the next."""
        for known in (self._norms, self._dead, self._masks, self._arrived):
            known.clear()

    def begin_anew(self, come: AbstractSet[str] = frozenset()) -> None:
        """Another sync has begun, and these tensors have come with it: no others count."""
        self._arrived = {norm: readers & come for norm, readers in self._arrived.items()}

    def norm(self, name: str, stored: Tensor) -> Tensor:
        """A norm as it is to be written now."""
        if name not in self._readers:
            return stored
        self._norms[name] = stored.clone()
        return self._masked(name)

    def codes(self, name: str, codes: Tensor) -> tuple[str, Tensor] | None:
        """The norm that has to be written again, now that these codes `[N, K]` have arrived."""
        norm = self._norm_of.get(name)
        if norm is None:
            return None
        self._dead[name] = (codes == 0).all(0)
        arrived = self._arrived.get(norm, frozenset()) | {name}
        self._arrived[norm] = arrived
        if arrived != self._readers[norm]:
            return None
        self._arrived[norm] = frozenset()
        mask = torch.stack([self._dead[reader] for reader in sorted(arrived)]).all(0)
        before = self._masks.get(norm)
        self._masks[norm] = mask
        is_new = bool(mask.any()) if before is None else not torch.equal(mask, before)
        return (norm, self._masked(norm)) if is_new and norm in self._norms else None

    def _masked(self, norm: str) -> Tensor:
        stored, mask = self._norms[norm], self._masks.get(norm)
        return stored.clone() if mask is None else stored.masked_fill(mask.to(stored.device), 0)


def _norms_of_readers(entries: Mapping[str, Entry]) -> dict[str, str]:
    norms: dict[str, list[tuple[str, Tensor]]] = {}
    for name, entry in entries.items():
        if entry.kind != torch.int8 and entry.input_scale is not None and not entry.offset:
            norms.setdefault(_block(name), []).append((name, entry.input_scale))
    found: dict[str, str] = {}
    for name, entry in entries.items():
        factor = entry.input_scale
        if entry.kind != torch.int8 or factor is None:
            continue
        fitting = [
            norm
            for norm, scale in norms.get(_block(name), [])
            if len(scale) == len(factor)
            and not norm.endswith(".bias")
            and bool(((scale * factor - 1).abs() < _ONE).all())
        ]
        if len(fitting) > 1:
            raise ProfileError(
                f"{name} may read {fitting[0]} or {fitting[1]}, which have the same factors: "
                "int8_prune cannot tell which of the two to silence. Use int8."
            )
        if fitting:
            found[name] = fitting[0]
    return found


def _block(name: str) -> str:
    found = _BLOCK.match(name)
    return found[0] if found else ""
