"""Machine code of one kind of GPU in a compiled library; the rest becomes zeros.

A fat binary's section holds containers, each a header (magic, version, its size, bytes of entries)
and entries, each with a header (kind, version, its size, bytes of payload, ..., architecture).
Containers are found by address, so each stays where it is, and the library keeps its size.
"""

from __future__ import annotations

import struct
from collections.abc import Iterator
from dataclasses import dataclass

MAGIC = 0xBA55ED50
PTX, ELF = 1, 2
HOPPER = 90


@dataclass(frozen=True)
class Entry:
    """One program of a container: machine code for an architecture, or PTX from one on."""

    kind: int
    architecture: int
    content: bytes  # its header and its payload


@dataclass(frozen=True)
class Container:
    """Where one lies in the library, and what it holds."""

    start: int
    header: int  # bytes
    end: int
    entries: list[Entry]


def slim(library: bytearray, *, keep_ptx: bool) -> None:
    """Leave in each container only what a Hopper GPU would choose; the bytes are the wheel's.

    Args:
        library: an ELF file with a section `.nv_fatbin`; changed in place.
        keep_ptx: where there is no machine code for Hopper, which the driver compiles then.

    Raises:
        ValueError: there is no such section, or it is not what was expected.

    """
    start, size = _section(library, ".nv_fatbin")
    found = list(containers(library, start, start + size))
    # An empty container might be refused; one for another GPU is passed over. The smallest will do.
    others = [e for c in found for e in c.entries if (e.kind, e.architecture) != (ELF, HOPPER)]
    filler = min(others, key=lambda entry: len(entry.content), default=None)
    for container in found:
        kept = _chosen(container, keep_ptx=keep_ptx)
        if not kept:
            least = min(container.entries, key=lambda entry: len(entry.content))
            fits = filler is not None and len(filler.content) < len(least.content)
            kept = [filler if fits and filler else least]
        filled = b"".join(entry.content for entry in kept)
        first = container.start + container.header
        library[first : container.end] = filled.ljust(container.end - first, b"\0")
        struct.pack_into("<Q", library, container.start + 8, len(filled))


def _chosen(container: Container, *, keep_ptx: bool) -> list[Entry]:
    code = [e for e in container.entries if (e.kind, e.architecture) == (ELF, HOPPER)]
    if code or not keep_ptx:
        return code
    return [e for e in container.entries if e.kind == PTX and e.architecture <= HOPPER]


def _section(library: bytes | bytearray, name: str) -> tuple[int, int]:
    """Offset and size of a section, by the library's own table."""
    (table,) = struct.unpack_from("<Q", library, 0x28)
    width, count, names = struct.unpack_from("<HHH", library, 0x3A)
    headers = [struct.unpack_from("<IIQQQQ", library, table + i * width) for i in range(count)]
    for label, _, _, _, offset, size in headers:
        first = headers[names][4] + label
        if library[first : library.index(b"\0", first)] == name.encode():
            return offset, size
    raise ValueError(f"the library has no section {name}: it holds no code of a GPU")


def containers(library: bytes | bytearray, at: int, end: int) -> Iterator[Container]:
    """Those between two offsets, in order."""
    while at + 16 <= end:
        magic, _, header, length = struct.unpack_from("<IHHQ", library, at)
        if magic != MAGIC:
            at += 8
            continue
        stop = at + header + length
        yield Container(at, header, stop, list(_entries(library, at + header, stop)))
        at = (stop + 7) // 8 * 8


def _entries(library: bytes | bytearray, at: int, stop: int) -> Iterator[Entry]:
    while at < stop:
        kind, _, own, payload = struct.unpack_from("<HHIQ", library, at)
        (architecture,) = struct.unpack_from("<I", library, at + 28)
        if own + payload == 0:
            raise ValueError(f"an entry at {at} has no size")
        yield Entry(kind, architecture, bytes(library[at : at + own + payload]))
        at += own + payload
    if at != stop:
        raise ValueError(f"the entries of a container end at {at}, and not at {stop} as it says")
