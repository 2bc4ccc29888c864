"""Put the parts that were packed into a folder that Python can import from, on the GPU machine.

Nothing is done twice: parts may come in one call, or in several. Every archive's sum is checked.
"""

from __future__ import annotations

import contextlib
import hashlib
import importlib.util
import io
import json
import os
import shutil
import subprocess
import sys
import tarfile
import time
import tomllib
from collections.abc import Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path
from typing import Any, NamedTuple

from tools.gpu.archives import MANIFEST
from tools.gpu.packages import EXPECTED, MARLIN

_KEPT = ".unpacked"  # a folder: a file an archive, with its sum
# Of numba, vLLM uses decorators on what it does for n-gram speculation alone.
_NUMBA = '''"""Stands in for a numba that does not import on this machine."""


def jit(*args, **kwargs):
    return args[0] if args and callable(args[0]) else lambda function: function


njit, prange = jit, range
get_num_threads, set_num_threads = (lambda: 1), (lambda n: None)
'''


class Damaged(Exception):
    """A part is not what was packed."""


class _Job(NamedTuple):
    part: Path
    archive: str
    sha256: str
    site: Path


def unpack(parts: Sequence[Path], site: Path) -> Iterator[str]:
    """Unpack what is not there yet; yields a line for each thing that is done.

    Args:
        parts: `part-N.tar` files, in any order.
        site: the folder.

    Raises:
        Damaged: a part is none, or an archive has another sum than it had when it was packed.

    """
    (site / _KEPT).mkdir(parents=True, exist_ok=True)
    manifests = {part: _manifest(part) for part in parts}
    jobs = [
        _Job(part, archive, expected, site)
        for part, manifest in manifests.items()
        for archive, expected in manifest["archives"].items()
        if not _is_there(site, archive, expected)
    ]
    yield from _unpack_all(jobs)
    if jobs:
        began = time.monotonic()
        _compile(site)
        yield f"compiled in {time.monotonic() - began:.1f} s"
        yield _look_at_the_machine(site)
    every = {archive for manifest in manifests.values() for archive in manifest["all"]}
    missing = sorted(archive for archive in every if not (site / _KEPT / archive).exists())
    yield f"not unpacked yet: {', '.join(missing)}" if missing else f"complete: {site}"


def _manifest(part: Path) -> dict[str, Any]:
    try:
        with tarfile.open(part) as outer:
            content = outer.extractfile(MANIFEST)
            manifest: dict[str, Any] = json.load(content) if content else {}
    except (OSError, tarfile.TarError, KeyError) as error:
        raise Damaged(
            f"{part} is no part of the kit ({error}). Pack it with `python -m tools.gpu.pack OUT`, "
            "and compare with OUT/SHA256SUMS."
        ) from error
    return manifest


def _is_there(site: Path, archive: str, expected: str) -> bool:
    noted = site / _KEPT / archive
    return noted.exists() and noted.read_text() == expected


def _unpack_all(jobs: Sequence[_Job]) -> Iterator[str]:
    """On all cores; an archive that holds another one's library once more comes last."""
    last = [job for job in jobs if job.archive.startswith(MARLIN)]
    with ProcessPoolExecutor(max(1, min(len(jobs), os.cpu_count() or 1))) as pool:
        for batch in ([job for job in jobs if job not in last], last):
            yield from pool.map(_unpack_one, batch)


def _unpack_one(job: _Job) -> str:
    began = time.monotonic()
    with tarfile.open(job.part) as outer:
        content = outer.extractfile(job.archive)
        packed = content.read() if content else b""
    found = hashlib.sha256(packed).hexdigest()
    if found != job.sha256:
        raise Damaged(
            f"{job.part}: {job.archive} has the sha256 {found}, and had {job.sha256} when it was "
            "packed. Carry it again."
        )
    with tarfile.open(fileobj=io.BytesIO(packed), mode="r:xz") as inner:
        inner.extractall(job.site, filter="data")
    (job.site / _KEPT / job.archive).write_text(job.sha256)
    return f"{job.archive} in {time.monotonic() - began:.1f} s"


def _compile(site: Path) -> None:
    """Thousands of modules: by all cores now, not by one when they are first imported."""
    command = [sys.executable, "-m", "compileall", "-qq", "-j", "0", "-r", "30", str(site)]
    subprocess.run(command, stderr=subprocess.DEVNULL, check=False)


def _look_at_the_machine(site: Path) -> str:
    """What vLLM imports and neither the kit nor the machine has."""
    lacking = [name for name in EXPECTED if not _can_be_found(name)]
    tried = [sys.executable, "-c", "import numba"]
    shutil.rmtree(site / "numba", ignore_errors=True)
    if subprocess.run(tried, capture_output=True, check=False).returncode:
        (site / "numba").mkdir()
        (site / "numba" / "__init__.py").write_text(_NUMBA)
        lacking.append("a numba that imports (a stand-in is there now)")
    return f"this machine lacks {', '.join(lacking)}" if lacking else "the machine has the rest"


def _can_be_found(name: str) -> bool:
    with contextlib.suppress(ImportError):
        return importlib.util.find_spec(name) is not None
    return False


def install(project: Path, site: Path) -> str:
    """Write the metadata that flashquant's version guard and vLLM's plugins read; and its command.

    Where there is no build backend, this is what `pip install -e` would have left behind.

    Args:
        project: the checkout.
        site: a folder that Python imports from.

    """
    facts = tomllib.loads((project / "pyproject.toml").read_text())["project"]
    for old in site.glob("flashquant-*.dist-info"):
        shutil.rmtree(old)
    folder = site / f"flashquant-{facts['version']}.dist-info"
    folder.mkdir(parents=True)
    (folder / "METADATA").write_text("\n".join(_metadata(facts)) + "\n")
    (folder / "entry_points.txt").write_text(_entry_points(facts))
    command = site / "bin" / "flashquant"
    command.parent.mkdir(exist_ok=True)
    command.write_text(
        f"#!{sys.executable}\nimport sys\nfrom flashquant.cli.main import main\nsys.exit(main())\n"
    )
    command.chmod(0o755)
    return f"flashquant {facts['version']} in {project}"


def _metadata(facts: dict[str, Any]) -> Iterator[str]:
    yield from ("Metadata-Version: 2.4", "Name: flashquant", f"Version: {facts['version']}")
    for need in facts.get("dependencies", ()):
        yield f"Requires-Dist: {need}"
    for extra, needs in facts.get("optional-dependencies", {}).items():
        yield f"Provides-Extra: {extra}"
        for need in needs:
            yield f"Requires-Dist: {need}; extra == '{extra}'"


def _entry_points(facts: dict[str, Any]) -> str:
    groups = {"console_scripts": facts.get("scripts", {}), **facts.get("entry-points", {})}
    return "\n".join(
        f"[{group}]\n" + "".join(f"{name} = {what}\n" for name, what in named.items())
        for group, named in groups.items()
    )
