"""What tensors hold, as text: 128 bits each, and one digest of many.

Two engines that serve the same policy in the same scheme have equal digests.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterable, Mapping, Sequence
from itertools import chain
from typing import Final

import torch
from torch import Tensor

from flashquant.schemes.fingerprints.quick import sums

_BYTES: Final = 16  # of a fingerprint, and of a digest

SeenMemory = dict[tuple[int, int], tuple[int, int]]
"""Address and bytes of host memory -> its sums; true until anything there is written or freed."""


class Fingerprints:
    """Fingerprints of many things, by name: taken where these lie, and read all at once.

    On a device nothing is waited for before `read`.
    """

    def __init__(self, contents: Iterable[tuple[str, Tensor | str]] = ()) -> None:
        self._known: dict[str, str] = {}
        self._layouts: dict[str, str] = {}
        self._sums: list[tuple[list[str], Tensor]] = []  # names, and what is not waited for
        self.add(contents)

    def add(
        self, contents: Iterable[tuple[str, Tensor | str]], seen: SeenMemory | None = None
    ) -> None:
        """Begin to take the fingerprints of tensors as they are now.

        Args:
            contents: by name. A string stands for memory whose bytes are out of reach: the
                fingerprint of what was packed into it.
            seen: sums that were just taken of host memory: what lies there is not read again, and
                what else is read is noted.

        """
        by_device: dict[torch.device, dict[str, Tensor]] = {}
        for name, value in contents:
            if isinstance(value, str):
                self._known[name] = value
                continue
            self._known[name] = ""  # in its place among the others
            self._layouts[name], flat = _as_it_lies(value)
            by_device.setdefault(flat.device, {})[name] = flat
        for flats in by_device.values():
            found = sums(list(flats.values())) if seen is None else _seen_sums(flats, seen)
            if isinstance(found, Tensor):
                self._sums.append((list(flats), found))
            else:
                self._note(flats, found)

    def read(self) -> dict[str, str]:
        """All of them, in the order in which they came; each device is waited for once."""
        for device in {found.device for _, found in self._sums}:
            here = [(names, found) for names, found in self._sums if found.device == device]
            values = torch.cat([found for _, found in here]).tolist()
            self._note(chain.from_iterable(names for names, _ in here), values)
        self._sums.clear()
        return dict(self._known)

    def _note(self, names: Iterable[str], found: Iterable[Sequence[int]]) -> None:
        for name, (first, second) in zip(names, found, strict=True):
            self._known[name] = _hashed(self._layouts[name], first, second)


def digests(
    contents: Iterable[tuple[str, Tensor | str]], seen: SeenMemory | None = None
) -> dict[str, str]:
    """The fingerprint of each thing the kernels read, by name; `seen` as for `Fingerprints`."""
    found = Fingerprints()
    found.add(contents, seen)
    return found.read()


def digest(parts: Mapping[str, str]) -> str:
    """One fingerprint of many, of their names and of their order."""
    fields = "".join(f"{len(name)} {name} {len(part)} {part} " for name, part in parts.items())
    return hashlib.blake2b(fields.encode(), digest_size=_BYTES).hexdigest()


def fingerprint(value: Tensor, known: tuple[int, int] | None = None) -> str:
    """128 bits, in hex, of a tensor's layout, dtype and values; its device is waited for.

    Of the layout, and two sums of the bytes: `definition`.

    Args:
        known: these sums, if they are, of a contiguous tensor.

    """
    if known is not None:
        return _hashed(_layout(value), *known)
    return digests([("", value)])[""]


def _seen_sums(flats: Mapping[str, Tensor], seen: SeenMemory) -> Tensor | Sequence[Sequence[int]]:
    """The sums of tensors on one device, each piece of host memory read once."""
    if next(iter(flats.values())).device.type != "cpu":
        return sums(list(flats.values()))
    places = {(flat.data_ptr(), flat.nbytes): flat for flat in flats.values()}
    unread = {place: flat for place, flat in places.items() if place not in seen}
    if unread:
        seen.update(zip(unread, sums(list(unread.values())), strict=True))
    return [seen[flat.data_ptr(), flat.nbytes] for flat in flats.values()]


def _as_it_lies(value: Tensor) -> tuple[str, Tensor]:
    """The description of a tensor's layout, and its elements, side by side."""
    # An `[N, K]` storage seen through `.t()` is read as it lies, without a copy.
    turned = value.dim() == 2 and not value.is_contiguous() and value.t().is_contiguous()
    flat = (value.t() if turned else value).detach().contiguous()
    return _layout(value, turned), flat


def _layout(value: Tensor, turned: bool = False) -> str:
    return f"{tuple(value.shape)} {value.dtype} {turned}"


def _hashed(layout: str, first: int, second: int) -> str:
    fields = f"{layout} {first} {second}"
    return hashlib.blake2b(fields.encode(), digest_size=_BYTES).hexdigest()
