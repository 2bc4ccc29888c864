"""What is packed on one machine is what Python imports on the other; nothing is downloaded."""

from __future__ import annotations

import hashlib
import json
import struct
import subprocess
import sys
import tarfile
import zipfile
from importlib.metadata import distributions
from pathlib import Path

import pytest

from tools.gpu import archives, fatbin, pack, packages, unpack

SM80, SM90 = 80, 90
ROOT = Path(__file__).parents[2]


def entry(kind: int, architecture: int, payload: bytes) -> bytes:
    header = struct.pack("<HHIQ", kind, 0, 64, len(payload)).ljust(28, b"\0")
    return (header + struct.pack("<I", architecture)).ljust(64, b"\0") + payload


def container(*entries: bytes) -> bytes:
    filled = b"".join(entries)
    return struct.pack("<IHHQ", fatbin.MAGIC, 1, 16, len(filled)) + filled


def library(*found: bytes) -> bytes:
    """An ELF file that is nothing but headers and one section of containers."""
    names = b"\0.nv_fatbin\0.shstrtab\0".ljust(24, b"\0")  # sections begin at multiples of 8
    code = b"".join(one.ljust((len(one) + 7) // 8 * 8, b"\0") for one in found)
    start = 64 + len(names)
    table = start + len(code)
    header = bytearray(64)
    struct.pack_into("<Q", header, 0x28, table)
    struct.pack_into("<HHH", header, 0x3A, 64, 3, 2)
    sections = b"".join(
        struct.pack("<IIQQQQ", name, 0, 0, 0, offset, size).ljust(64, b"\0")
        for name, offset, size in ((0, 0, 0), (1, start, len(code)), (12, 64, len(names)))
    )
    return bytes(header) + names + code + sections


def slimmed(content: bytes, *, keep_ptx: bool) -> bytes:
    changed = bytearray(content)
    fatbin.slim(changed, keep_ptx=keep_ptx)
    return bytes(changed)


HOPPERS = entry(fatbin.ELF, SM90, b"hopper's code" * 9)
AMPERES = entry(fatbin.ELF, SM80, b"ampere's code" * 9)
PTX = entry(fatbin.PTX, SM80, b"ptx" * 99)


def test_a_slimmed_library_keeps_hoppers_code_its_size_and_its_layout() -> None:
    whole = library(container(AMPERES, HOPPERS, PTX), container(HOPPERS))

    slim = slimmed(whole, keep_ptx=True)

    assert len(slim) == len(whole)
    assert slim.count(HOPPERS) == 2
    assert b"ampere" not in slim
    assert PTX not in slim


@pytest.mark.parametrize("keep_ptx", [True, False])
def test_ptx_is_kept_where_hopper_has_no_code_of_its_own(keep_ptx: bool) -> None:
    slim = slimmed(library(container(AMPERES, PTX), container(HOPPERS)), keep_ptx=keep_ptx)

    assert (PTX in slim) == keep_ptx
    assert (AMPERES in slim) != keep_ptx  # the smallest there is: a container is never empty
    assert HOPPERS in slim


def test_a_library_without_gpu_code_is_refused() -> None:
    broken = library(container(HOPPERS)).replace(b".nv_fatbin", b".xx_fatbin")

    with pytest.raises(ValueError, match="no section"):
        slimmed(broken, keep_ptx=True)


@pytest.fixture
def wheels(tmp_path: Path) -> tuple[Path, Path]:
    """A vLLM, and a package beside it."""
    code = library(container(AMPERES, HOPPERS, PTX), container(AMPERES, PTX))
    vllm = wheel(
        tmp_path / "vllm-0.26.0-cp38-abi3-linux.whl",
        dict.fromkeys(packages.LARGE.values(), code)
        | {
            "vllm/__init__.py": b"there = 26",
            "vllm/vllm-rs": b"a front end that is left out",
            "vllm-0.26.0.dist-info/METADATA": b"Name: vllm\nVersion: 0.26.0\n",
        },
    )
    other = wheel(
        tmp_path / "astor-0.8.1-py3-none-any.whl",
        {"astor/__init__.py": b"", "astor/tests/x.py": b"", "a.data/purelib/moved.py": b"here = 1"},
    )
    return vllm, other


def wheel(path: Path, files: dict[str, bytes]) -> Path:
    with zipfile.ZipFile(path, "w") as archive:
        for name, content in files.items():
            archive.writestr(name, content)
    return path


@pytest.fixture
def parts(wheels: tuple[Path, Path], tmp_path: Path) -> list[Path]:
    return packed(wheels, tmp_path, limit=1_000_000)


def packed(
    wheels: tuple[Path, Path], out: Path, limit: int, *, backwards: bool = False
) -> list[Path]:
    ready = {}
    found = list(archives.archives(wheels[0], wheels[1:], full=False))
    for name, content in reversed(found) if backwards else found:
        ready[name] = out / f"{name}.tar.xz"
        ready[name].write_bytes(archives.compressed(content))
    return archives.write_parts(ready, out, limit)


def test_what_was_packed_is_what_python_imports(parts: list[Path], tmp_path: Path) -> None:
    site = tmp_path / "site"

    lines = list(unpack.unpack(parts, site))

    assert lines[-1] == f"complete: {site}"
    look = "import vllm, moved; print(vllm.there, moved.here)"
    said = subprocess.run(
        [sys.executable, "-c", look], cwd=site, capture_output=True, text=True, check=True
    )
    assert said.stdout == "26 1\n"
    assert not (site / "vllm" / "vllm-rs").exists()
    assert not (site / "astor" / "tests").exists()


def test_the_library_with_more_in_it_has_the_last_word(
    wheels: tuple[Path, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Two archives hold the experts' library; here the smaller one would come last."""
    monkeypatch.setattr("os.cpu_count", lambda: 1)
    parts = packed(wheels, tmp_path, limit=1_000_000, backwards=True)

    list(unpack.unpack(parts, tmp_path / "site"))

    assert PTX in (tmp_path / "site" / packages.LARGE["moe"]).read_bytes()


def test_nothing_is_unpacked_twice(parts: list[Path], tmp_path: Path) -> None:
    site = tmp_path / "site"
    list(unpack.unpack(parts, site))
    (site / "vllm" / "__init__.py").write_text("there = 'mine'")

    assert list(unpack.unpack(parts, site)) == [f"complete: {site}"]
    assert (site / "vllm" / "__init__.py").read_text() == "there = 'mine'"


def test_parts_may_come_one_by_one(wheels: tuple[Path, Path], tmp_path: Path) -> None:
    found = packed(wheels, tmp_path, limit=25_000)
    assert len(found) > 1

    assert "not unpacked yet: " in list(unpack.unpack(found[:1], tmp_path / "site"))[-1]
    assert "complete" in list(unpack.unpack(found[1:], tmp_path / "site"))[-1]


def test_a_damaged_archive_is_refused(parts: list[Path], tmp_path: Path) -> None:
    content = bytearray(parts[0].read_bytes())
    with tarfile.open(parts[0]) as tar:
        place = tar.getmember("vllm.tar.xz").offset_data
    content[place + 40] ^= 1
    parts[0].write_bytes(content)

    with pytest.raises(unpack.Damaged, match="Carry it again"):
        list(unpack.unpack(parts, tmp_path / "site"))


def test_what_is_no_part_is_refused(tmp_path: Path) -> None:
    stranger = tmp_path / "part-1.tar"
    stranger.write_bytes(b"<html>not found</html>")

    with pytest.raises(unpack.Damaged, match="no part of the kit"):
        list(unpack.unpack([stranger], tmp_path / "site"))


def test_an_archive_that_fits_no_part_is_refused(tmp_path: Path) -> None:
    (tmp_path / "large.tar.xz").write_bytes(bytes(90_000))

    with pytest.raises(ValueError, match="a part may have 50,000"):
        archives.write_parts({"large": tmp_path / "large.tar.xz"}, tmp_path, 50_000)


def test_no_part_is_larger_than_its_limit(wheels: tuple[Path, Path], tmp_path: Path) -> None:
    for part in packed(wheels, tmp_path, limit=25_000):
        assert part.stat().st_size <= 25_000
        with tarfile.open(part) as tar:
            sums = json.load(tar.extractfile(archives.MANIFEST))["archives"]  # type: ignore[arg-type]
            for name, expected in sums.items():
                content = tar.extractfile(name).read()  # type: ignore[union-attr]
                assert hashlib.sha256(content).hexdigest() == expected


def test_pythons_metadata_says_what_the_checkout_says(tmp_path: Path) -> None:
    """The version guard and vLLM's plugins read it, and no build backend is there to write it."""
    unpack.install(ROOT, tmp_path)
    unpack.install(ROOT, tmp_path)  # a second time is no second distribution

    (found,) = distributions(path=[str(tmp_path)])
    assert any(need.startswith("vllm") for need in found.requires or ())
    plugins = [point for point in found.entry_points if point.group == "vllm.general_plugins"]
    assert [point.value for point in plugins] == ["flashquant:patch_from_env"]


def test_the_checkout_is_packed_without_what_is_made_of_it(tmp_path: Path) -> None:
    with tarfile.open(archives.write_project(ROOT, tmp_path, "abc123")) as tar:
        names = tar.getnames()
        assert tar.extractfile("COMMIT").read() == b"abc123"  # type: ignore[union-attr]

    assert {"pyproject.toml", "tools/gpu/__main__.py", "benchmarks/gpu/__main__.py"} <= {*names}
    assert not [name for name in names if "__pycache__" in name or name.startswith("tests")]


def test_wheels_are_found_however_their_names_are_written(tmp_path: Path) -> None:
    (tmp_path / "partial_json_parser-0.2-py3-none-any.whl").touch()

    assert pack.wheel_of("Partial-JSON.parser==0.2", tmp_path).name.startswith("partial")
    with pytest.raises(FileNotFoundError, match=r"no wheel of partial-json-parser==0\.3"):
        pack.wheel_of("partial-json-parser==0.3", tmp_path)
