"""Whether a run of the tests has the disk that it takes, before it begins."""

from __future__ import annotations

import shutil
import tempfile
from collections.abc import Callable

GB = 10**9
# What a whole run left under the temporary folder on 27 November 2026: 3.5 GB. A few tests write
# as much as a tiny model or two.
WHOLE, FEW = 4 * GB, GB // 4


def _free(path: str) -> int:
    return shutil.disk_usage(path).free


def lacking(*, whole: bool, free: Callable[[str], int] = _free) -> str:
    """What there is too little of: what is, what should be, and what to do; or nothing.

    Args:
        whole: whether every test is run, or some that were named.
        free: how many bytes are free on the disk of a path.

    """
    folder, need = tempfile.gettempdir(), WHOLE if whole else FEW
    if (there := free(folder)) >= need:
        return ""
    return (
        f"{folder} has {there / GB:.1f} GB free, and these tests take up to {need / GB:.1f} GB of "
        "it: remove what earlier runs left there (pytest-of-*), or set TMPDIR to a larger disk"
    )
