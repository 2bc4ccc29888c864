"""int8 calibration: by which numbers each weight is scaled before it is stored.

    q = round((w * output_scale) * input_scale)     a linear layer: one number a row, one a column
    n = (w * output_scale) * input_scale            a norm, in its own dtype

A profile belongs to one W8A8 checkpoint: its weight scales are what the codes mean.
FlashRL's files (`profile.pt`) are read; ours are safetensors with a typed header.

    profile = load_profile("owner/repo/profile.pt@v1")
    save_profile(profile, "profile.safetensors")
"""

from __future__ import annotations

import zipfile
from typing import TYPE_CHECKING

from flashquant.config.locate import locate
from flashquant.errors import ProfileError
from flashquant.profiles.bases import with_base
from flashquant.profiles.calibration import Calibration, Clipping
from flashquant.profiles.fit import check_profile_fits
from flashquant.profiles.flashrl import read_flashrl, read_names
from flashquant.profiles.header import Base
from flashquant.profiles.kv_scales import read_kv_scales, save_kv_scales
from flashquant.profiles.profile import Entry, Profile, fingerprint
from flashquant.profiles.stored import read_stored, save_profile

if TYPE_CHECKING:
    from pathlib import Path

__all__ = [
    "Base",
    "Calibration",
    "Clipping",
    "Entry",
    "Profile",
    "check_profile_fits",
    "fingerprint",
    "load_kv_scales",
    "load_names",
    "load_profile",
    "save_kv_scales",
    "save_profile",
    "with_base",
]


def load_profile(reference: str | Path) -> Profile:
    """Read a profile: a path, or a file on the Hub; FlashRL's `.pt`, or ours.

    Nothing that a file holds is executed.

    Raises:
        LocateError: there is no such file.
        ProfileError: it is not a profile, or says something impossible.

    """
    path, pinned = locate(str(reference))
    is_ours = path.suffix == ".safetensors"
    try:
        return read_stored(path, pinned) if is_ours else read_flashrl(path, pinned)
    except (OSError, zipfile.BadZipFile) as broken:
        raise ProfileError(f"{pinned} cannot be read ({broken}). Copy it anew.") from broken


def load_kv_scales(reference: str | Path) -> dict[str, tuple[float, float]]:
    """Read the scales of a KV cache, of keys and values by attention layer: a path, or on the Hub.

    Raises:
        LocateError: there is no such file.
        ProfileError: it holds none, or one that is not finite and above 0.

    """
    path, pinned = locate(str(reference))
    return read_kv_scales(path, pinned)


def load_names(reference: str | Path) -> tuple[str, ...]:
    """Read FlashRL's profile of an fp8 scheme: the names of the weights that are quantized.

    Raises:
        LocateError: there is no such file.
        ProfileError: it is no list of names.

    """
    path, pinned = locate(str(reference))
    try:
        return read_names(path, pinned)
    except (OSError, zipfile.BadZipFile) as broken:
        raise ProfileError(f"{pinned} cannot be read ({broken}). Copy it anew.") from broken
