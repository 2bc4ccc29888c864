"""Build a C file for this very CPU, once, into the user's cache.

Whoever can write into the folder of the cache can make us run code, so it has to be the user's
own and closed to others; where it is not, a private temporary folder serves one process.
"""

from __future__ import annotations

import hashlib
import os
import platform
import shutil
import subprocess
import tempfile
from pathlib import Path
from typing import Final

from flashquant.config import env

_HERE: Final = Path(__file__).parent
ROWS: Final = tuple(_HERE / name for name in ("rows.c", "lanes.h", "mantissas.h"))
# Nothing here lets a compiler change a bit: no contraction, no reassociation, no flush to zero.
_FLAGS: Final = (
    "-std=c11",
    "-O3",
    "-march=native",
    "-fno-math-errno",
    "-fno-trapping-math",
    "-ffp-contract=off",
    "-fPIC",
    "-fopenmp",
)
_SECONDS: Final = 120


class BuildError(Exception):
    """There is no library, and why."""


def built(sources: tuple[Path, ...] = ROWS) -> Path:
    """The shared library for this machine, built if it is not there yet.

    It is not linked to an OpenMP of its own: the one that torch has loaded serves it, with
    torch's threads.

    Args:
        sources: a C file, and the headers that it includes.

    Raises:
        BuildError: no compiler, or it fails.

    """
    compiler = env.COMPILER.read(os.environ) or next(
        filter(shutil.which, ("cc", "gcc", "clang")), None
    )
    if compiler is None:
        raise BuildError("there is no C compiler on the PATH; install gcc")
    folder = _folder()
    library = folder / f"{sources[0].stem}-{_key(compiler, sources)}.so"
    if library.exists():
        return library
    with tempfile.TemporaryDirectory(dir=folder) as scratch:
        made, found = Path(scratch) / "made.o", Path(scratch) / "made.so"
        _run(compiler, *_FLAGS, "-c", str(sources[0]), "-o", str(made))
        _run(compiler, "-shared", str(made), "-o", str(found))
        found.replace(library)  # whole or not at all, whoever else builds it now
    return library


def _run(*command: str) -> None:
    try:
        subprocess.run(command, check=True, capture_output=True, text=True, timeout=_SECONDS)
    except subprocess.CalledProcessError as failure:
        said = (failure.stderr or "").strip().splitlines()
        raise BuildError(f"{command[0]} failed: {said[-1] if said else failure}") from failure
    except (OSError, subprocess.TimeoutExpired) as failure:
        raise BuildError(f"{command[0]} could not be run: {failure}") from failure


def _key(compiler: str, sources: tuple[Path, ...]) -> str:
    """What the library depends on: a home folder may be shared by different machines."""
    parts = [compiler, *_FLAGS, platform.machine(), platform.python_implementation(), _cpu()]
    digest = hashlib.sha256("\0".join(parts).encode())
    for source in sources:
        digest.update(source.read_bytes())
    return digest.hexdigest()[:24]


def _cpu() -> str:
    """What `-march=native` looks at."""
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        return platform.processor()
    wanted = ("model name", "flags", "Features", "CPU part")
    return "\n".join(sorted({line for line in lines if line.startswith(wanted)}))


def _folder() -> Path:
    """A folder that no other user can write into."""
    own = env.CACHE.read(os.environ)
    base = env.CACHE_HOME.read(os.environ) or Path.home() / ".cache"
    folder = Path(own) if own else Path(base) / "flashquant"
    try:
        folder.mkdir(mode=0o700, parents=True, exist_ok=True)
        state = folder.stat()
    except (OSError, RuntimeError):
        return _private()
    closed = state.st_uid == os.getuid() and not state.st_mode & 0o022
    return folder if closed and os.access(folder, os.W_OK) else _private()


def _private() -> Path:
    return Path(tempfile.mkdtemp(prefix="flashquant-"))
