"""Wheels into archives, and archives into parts that can be carried."""

from __future__ import annotations

import hashlib
import io
import json
import lzma
import re
import tarfile
import zipfile
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import NamedTuple

from tools.gpu.fatbin import slim
from tools.gpu.packages import HOPPER_ONLY, LARGE, LEFT_OUT, MARLIN

MANIFEST = "manifest.json"
COMMIT = "COMMIT"
_OVERHEAD = 2048  # bytes of a member of a tar
_SPARE = 20_000  # bytes of a part for its manifest
_OF_THE_PROJECT = ("flashquant", "benchmarks", "tools", "pyproject.toml", "README.md", "LICENSE")


class Member(NamedTuple):
    """One file of an archive; its content is made when it is asked for."""

    path: str
    read: Callable[[], bytes]
    mode: int


def members(wheel: Path) -> list[Member]:
    """What of a wheel is carried, under the paths that it is imported from."""
    found = []
    with zipfile.ZipFile(wheel) as archive:
        for info in archive.infolist():
            if info.is_dir() or LEFT_OUT.search(info.filename):
                continue
            path = re.sub(r"^[^/]+\.data/(purelib|platlib)/", "", info.filename)
            mode = 0o755 if ".so" in path else 0o644
            found.append(Member(path, _reader(wheel, info.filename), mode))
    return found


def _reader(wheel: Path, name: str) -> Callable[[], bytes]:
    def read() -> bytes:
        with zipfile.ZipFile(wheel) as archive:
            return archive.read(name)

    return read


def archives(vllm: Path, wheels: Iterable[Path], *, full: bool) -> Iterator[tuple[str, list]]:
    """Each archive's name and its members, what is needed first in the first.

    Args:
        vllm: its wheel.
        wheels: of the other packages.
        full: keep machine code of every GPU.

    """
    yield "deps", [member for wheel in wheels for member in members(wheel)]
    everything = {member.path: member for member in members(vllm)}
    large = {name: everything.pop(path) for name, path in LARGE.items()}
    yield "vllm", list(everything.values())
    for name, member in large.items():
        is_whole = full or name in HOPPER_ONLY
        yield name, [member if is_whole else _slimmed(member, keep_ptx=name != "moe")]
    if not full:
        yield MARLIN, [_slimmed(large["moe"], keep_ptx=True)]


def _slimmed(member: Member, *, keep_ptx: bool) -> Member:
    def read() -> bytes:
        library = bytearray(member.read())
        slim(library, keep_ptx=keep_ptx)
        return bytes(library)

    return member._replace(read=read)


def compressed(content: Iterable[Member]) -> bytes:
    """A tar.xz; files of one kind lie side by side, which is what xz likes."""
    plain = io.BytesIO()
    with tarfile.open(fileobj=plain, mode="w") as archive:
        for member in sorted(content, key=lambda m: (Path(m.path).suffix, m.path)):
            _add(archive, member.path, member.read(), member.mode)
    return lzma.compress(plain.getvalue(), preset=6)


def write_parts(ready: Mapping[str, Path], out: Path, limit: int) -> list[Path]:
    """Write `part-1.tar` and so on; old ones are removed.

    Args:
        ready: each archive's file, by its name, in order.
        out: where to.
        limit: bytes of a part.

    Raises:
        ValueError: an archive is larger than a part may be.

    """
    parts = _shared_out({name: path.stat().st_size for name, path in ready.items()}, limit)
    for old in out.glob("part-*.tar"):
        old.unlink()
    return [_write_part(number, parts, ready, out) for number in range(1, len(parts) + 1)]


def _shared_out(sizes: Mapping[str, int], limit: int) -> list[list[str]]:
    """Names of each part: first fit, in order."""
    parts: list[list[str]] = []
    room: list[int] = []
    for name, size in sizes.items():
        need = size + _OVERHEAD
        if need > limit - _SPARE:
            raise ValueError(f"{name} has {size:,} bytes, and a part may have {limit:,}")
        index = next((i for i, free in enumerate(room) if need <= free), len(parts))
        if index == len(parts):
            parts.append([])
            room.append(limit - _SPARE)
        parts[index].append(name)
        room[index] -= need
    return parts


def _write_part(
    number: int, parts: Sequence[Sequence[str]], ready: Mapping[str, Path], out: Path
) -> Path:
    sums = {f"{n}.tar.xz": sha256(ready[n].read_bytes()) for n in parts[number - 1]}
    everything = [f"{name}.tar.xz" for part in parts for name in part]
    manifest = {"part": number, "of": len(parts), "archives": sums, "all": everything}
    path = out / f"part-{number}.tar"
    with tarfile.open(path, "w") as tar:
        _add(tar, MANIFEST, json.dumps(manifest, indent=1).encode(), 0o644)
        for name in parts[number - 1]:
            _add(tar, f"{name}.tar.xz", ready[name].read_bytes(), 0o644)
    return path


def write_project(project: Path, out: Path, commit: str) -> Path:
    """The checkout as it lies, without what is made of it: `project.tar`.

    Args:
        project: the checkout.
        out: where to.
        commit: which one it is; a file in the archive, for no git goes with it.

    """
    path = out / "project.tar"
    with tarfile.open(path, "w:xz") as tar:
        for name in _OF_THE_PROJECT:
            if (project / name).exists():
                tar.add(project / name, name, filter=_source)
        _add(tar, COMMIT, commit.encode(), 0o644)
    return path


def _source(info: tarfile.TarInfo) -> tarfile.TarInfo | None:
    name = Path(info.name)
    if name.suffix in {".pyc", ".png"} or {"__pycache__", "out"} & set(name.parts):
        return None
    info.uid = info.gid = info.mtime = 0
    info.uname = info.gname = ""
    return info


def _add(tar: tarfile.TarFile, name: str, content: bytes, mode: int) -> None:
    info = tarfile.TarInfo(name)
    info.size, info.mode = len(content), mode
    tar.addfile(info, io.BytesIO(content))


def sha256(content: bytes) -> str:
    return hashlib.sha256(content).hexdigest()
