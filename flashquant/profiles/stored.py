"""Our file of a profile: safetensors, a typed header in its metadata, read lazily.

The header is read and checked when the file is opened, the numbers of an entry when it
is asked for: so looking at a profile reads a few kilobytes of it.
"""

from __future__ import annotations

import os
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Final

from pydantic import ValidationError
from safetensors.torch import save_file
from torch import Tensor

from flashquant.errors import ProfileError
from flashquant.profiles.header import EntryHeader, Header
from flashquant.profiles.profile import HELD, KINDS, SIDES, Entry, Profile
from flashquant.tensor_files import TensorFile

_HEADER: Final = "flashquant_profile"
_INT8, _INT8_BY_CHANNEL = "int8", "int8_channel"  # the scheme, and what files have always called it


class _Entries(Mapping[str, Entry]):
    """The entries of an open file, each read when it is asked for."""

    def __init__(self, file: TensorFile, headers: Mapping[str, EntryHeader], source: str) -> None:
        self._file, self._headers, self._source = file, headers, source

    def __getitem__(self, name: str) -> Entry:
        header = self._headers[name]
        try:
            columns, rows, worth, held = (
                self._file.get(f"{name}.{side}") for side in (*SIDES, HELD)
            )
            entry = Entry(KINDS[header.kind], columns, rows, worth, header.offset, held)
            if entry.shape != tuple(header.shape):
                raise ProfileError(f"is {header.shape} by the header, {list(entry.shape)} by size")
        except ProfileError as refusal:
            raise ProfileError(f"{self._source}: {name} {refusal}. Make it anew.") from None
        except OSError as broken:
            raise ProfileError(
                f"{self._source} cannot be read any more ({broken}). Put it back, and start anew."
            ) from broken
        return entry

    def __iter__(self) -> Iterator[str]:
        return iter(self._headers)

    def __len__(self) -> int:
        return len(self._headers)


def read_stored(path: Path, source: str) -> Profile:
    """Open one of our files.

    Raises:
        ProfileError: it is none, or its header and its tensors disagree.

    """
    try:
        file = TensorFile(path)
    except OSError as broken:
        raise ProfileError(
            f"{source} is no safetensors file, or claims what it does not hold ({broken}). Copy or "
            "make it anew."
        ) from broken
    text = file.metadata.get(_HEADER)
    if text is None:
        raise ProfileError(
            f"{source} holds tensors and no profile: its metadata has no {_HEADER!r}. Make one "
            "with `flashquant profile convert`."
        )
    try:
        header = Header.model_validate_json(text)
    except ValidationError as error:
        problem = error.errors(include_url=False)[0]
        place = ".".join(map(str, problem["loc"]))
        raise ProfileError(f"{source}: header, {place}: {problem['msg']}") from None
    known = {f"{name}.{side}" for name in header.entries for side in (*SIDES, HELD)}
    stored = set(file)
    if foreign := sorted(stored - known):
        raise ProfileError(
            f"{source} holds {foreign[0]!r}, which its header does not speak of. Make it anew."
        )
    scheme = _INT8 if header.scheme == _INT8_BY_CHANNEL else header.scheme
    for name, entry in header.entries.items():
        if (f"{name}.{HELD}" in stored) != (entry.kind == _INT8 != scheme):
            raise ProfileError(
                f"{source} is for {scheme}, and {name} has {HELD} of int4, or lacks it. Make it "
                "anew."
            )
    return Profile(_Entries(file, header.entries, source), source, header.base, scheme)


def save_profile(profile: Profile, path: str | os.PathLike[str]) -> None:
    """Write a profile in our format; the file appears when it is whole.

    Raises:
        ProfileError: the path does not end in `.safetensors`, or the profile is empty.

    """
    target = Path(path)
    if target.suffix != ".safetensors":
        raise ProfileError(f"{target} is to be a safetensors file; end its name in .safetensors")
    if not profile.entries:
        raise ProfileError(f"{profile.source} has no entries; there is nothing to save")
    names = {dtype: name for name, dtype in KINDS.items()}
    headers: dict[str, EntryHeader] = {}
    tensors: dict[str, Tensor] = {}
    for name, entry in profile.entries.items():
        headers[name] = EntryHeader.model_validate(
            {
                "kind": names[entry.kind],
                "shape": list(entry.shape),
                "offset": int(entry.offset),
            }
        )
        for side, vector in entry.tensors.items():
            tensors[f"{name}.{side}"] = vector.detach().clone()  # vectors may share memory
    scheme = _INT8_BY_CHANNEL if profile.scheme == _INT8 else profile.scheme
    header = Header.model_validate({"scheme": scheme, "base": profile.base, "entries": headers})
    unfinished = target.with_name(f".{target.name}.{os.getpid()}")
    try:
        save_file(tensors, unfinished, metadata={_HEADER: header.model_dump_json()})
        os.replace(unfinished, target)
    finally:
        unfinished.unlink(missing_ok=True)
