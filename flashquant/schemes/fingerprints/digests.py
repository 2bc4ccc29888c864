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


class Fingerprints:
    """Fingerprints of many things, by name: taken where these lie, and read all at once.

    On a device nothing is waited for before `read`.
    """

    def __init__(self, contents: Iterable[tuple[str, Tensor | str]] = ()) -> None:
        self._known: dict[str, str] = {}
        self._layouts: dict[str, str] = {}
        self._sums: list[tuple[list[str], Tensor]] = []  # names, and what is not waited for
        self.add(contents)

    def add(self, contents: Iterable[tuple[str, Tensor | str]]) -> None:
        """Begin to take the fingerprints of tensors as they are now.

        A string stands for memory whose bytes are out of reach: the fingerprint of what was
        packed into it.
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
            found = sums(list(flats.values()))
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


def digests(contents: Iterable[tuple[str, Tensor | str]]) -> dict[str, str]:
    """The fingerprint of each thing the kernels read, by name."""
    return Fingerprints(contents).read()


def digest(parts: Mapping[str, str]) -> str:
    """One fingerprint of many, of their names and of their order."""
    fields = "".join(f"{len(name)} {name} {len(part)} {part} " for name, part in parts.items())
    return hashlib.blake2b(fields.encode(), digest_size=_BYTES).hexdigest()


def fingerprint(value: Tensor) -> str:
    """128 bits, in hex, of a tensor's layout, dtype and values; its device is waited for.

    Of the layout, and two sums of the bytes: `definition`.
    """
    return digests([("", value)])[""]


def _as_it_lies(value: Tensor) -> tuple[str, Tensor]:
    """The description of a tensor's layout, and its elements, side by side."""
    # An `[N, K]` storage seen through `.t()` is read as it lies, without a copy.
    turned = value.dim() == 2 and not value.is_contiguous() and value.t().is_contiguous()
    flat = (value.t() if turned else value).detach().contiguous()
    return f"{tuple(value.shape)} {value.dtype} {turned}", flat


def _hashed(layout: str, first: int, second: int) -> str:
    fields = f"{layout} {first} {second}"
    return hashlib.blake2b(fields.encode(), digest_size=_BYTES).hexdigest()
