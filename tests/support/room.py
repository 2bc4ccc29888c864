"""Whether a run of the tests has the disk and the shared memory that it takes, before it begins."""

from __future__ import annotations

import shutil
import tempfile
from collections.abc import Callable
from pathlib import Path

GB = 10**9
# What a whole run left under the temporary folder on 27 November 2026: 3.5 GB; in shared memory it
# was seen with 0.35. A few tests write as much as a tiny model or two.
WHOLE = {"tmp": 6 * GB, "/dev/shm": GB}
FEW = {"tmp": GB // 2, "/dev/shm": GB // 4}
MENDS = {
    "tmp": "remove what earlier runs left there (pytest-of-*), or set TMPDIR to a larger disk",
    "/dev/shm": "give the container more of it (docker run --shm-size 1g)",
}


def _free(path: str) -> int:
    return shutil.disk_usage(path).free


def lacking(*, whole: bool, free: Callable[[str], int] = _free) -> list[str]:
    """What there is too little of: what is, what should be, and what to do.

    Args:
        whole: whether every test is run, or some that were named.
        free: how many bytes are free on the disk of a path.

    """
    said = []
    for name, need in (WHOLE if whole else FEW).items():
        path = tempfile.gettempdir() if name == "tmp" else name
        if Path(path).is_dir() and (there := free(path)) < need:
            said.append(
                f"{path} has {there / GB:.1f} GB free, and these tests take up to "
                f"{need / GB:.1f} GB of it: {MENDS[name]}"
            )
    return said
