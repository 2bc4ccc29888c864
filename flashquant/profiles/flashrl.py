"""FlashRL's `profile.pt`: a pickled dict, read without running any of it.

    {name: {"input_scale": tensor or 1.0, "output_scale": tensor or 1.0, "type": torch.int8}}

torch's restricted unpickler takes tensors, dtypes and plain containers; whatever else a
pickle asks for is refused before it is looked up.
"""

from __future__ import annotations

import pickle
import re
import warnings
import zipfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Final

import torch
from torch import Tensor

from flashquant.errors import ProfileError
from flashquant.profiles.profile import Entry, Profile

_KEYS: Final = frozenset({"input_scale", "output_scale", "type"})
_ASKED_FOR: Final = re.compile(r"GLOBAL (\S+)")


def read_flashrl(path: Path, source: str) -> Profile:
    """Read a profile that FlashRL has saved.

    Raises:
        ProfileError: it is none, asks for code, or holds impossible numbers.

    """
    held = _unpickled(path, source)
    if not isinstance(held, Mapping) or not held:
        raise ProfileError(
            f"{source} holds a {type(held).__name__}, but a profile is a dict of weights. Is it a "
            "checkpoint?"
        )
    return Profile({str(name): _entry(source, name, held[name]) for name in held}, source)


def read_names(path: Path, source: str) -> tuple[str, ...]:
    """Read a profile of an fp8 scheme: a list of the weights that are quantized.

    Raises:
        ProfileError: it is none, or asks for code.

    """
    held = _unpickled(path, source)
    if not isinstance(held, list | tuple) or not all(isinstance(name, str) for name in held):
        raise ProfileError(
            f"{source} holds a {type(held).__name__}, but the profile of an fp8 scheme is a list "
            "of the names of weights. Is it one for int8?"
        )
    if not held:
        raise ProfileError(f"{source} lists no weight, so nothing would be quantized; use bf16")
    return tuple(held)


def _unpickled(path: Path, source: str) -> object:
    if zipfile.is_zipfile(path):
        _check_stored_plainly(path, source)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # what torch thinks of odd pickles; we refuse them
            # Not mapped: torch (2.13) then takes the length of a tensor from the pickle, and reads
            # whatever follows the record in the file; loaded, it compares the two.
            return torch.load(path, map_location="cpu", weights_only=True)
    except pickle.UnpicklingError as refusal:
        found = _ASKED_FOR.search(str(refusal))
        if found is None:
            raise ProfileError(f"{source} is no file that torch.save wrote") from None
        raise ProfileError(
            f"{source} is a pickle that asks for {found[1]}, which no profile needs. Nothing of "
            "it was run; do not load it elsewhere."
        ) from None
    except (RuntimeError, EOFError, ValueError, LookupError, TypeError, AttributeError) as broken:
        said = " ".join(str(broken).split())[:200]
        raise ProfileError(
            f"{source} is no file that torch.save wrote, or a part of one ({said}). Copy it anew."
        ) from None


def _check_stored_plainly(path: Path, source: str) -> None:
    """torch never compresses; a kilobyte that unpacks to gigabytes is none of its files."""
    with zipfile.ZipFile(path) as archive:
        for record in archive.infolist():
            if record.compress_type != zipfile.ZIP_STORED:
                raise ProfileError(
                    f"{source} holds a compressed record ({record.filename}, {record.file_size} "
                    "bytes unpacked), which torch.save never writes"
                )


def _entry(source: str, name: object, fields: object) -> Entry:
    if not isinstance(fields, Mapping) or set(fields) != _KEYS:
        keys = sorted(map(str, fields)) if isinstance(fields, Mapping) else type(fields).__name__
        raise ProfileError(f"{source}: {name} holds {keys}, but should hold {sorted(_KEYS)}")
    try:
        return Entry(
            fields["type"],
            _vector("input_scale", fields["input_scale"]),
            _vector("output_scale", fields["output_scale"]),
        )
    except ProfileError as refusal:
        raise ProfileError(
            f"{source}: {name} {refusal}. FlashRL divides by norm weights and rows that may be all "
            "zeros; make the profile anew."
        ) from None


def _vector(side: str, scale: Any) -> Tensor | None:
    """`[n]` from FlashRL's `[1, n]`, `[n, 1]` or `[n]`; None for its 1.0."""
    if isinstance(scale, int | float) and scale == 1:
        return None
    if not isinstance(scale, Tensor):
        raise ProfileError(f"has an {side} that is {scale!r:.60}; it should be a tensor, or 1.0")
    long = [size for size in scale.shape if size != 1]
    if len(long) > 1 or not scale.is_contiguous():  # a stride of 0 claims what is not there
        shape = tuple(scale.shape)
        raise ProfileError(f"has an {side} of shape {shape}; it should be one number a channel")
    return scale.detach().flatten()
