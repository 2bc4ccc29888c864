"""Pack a real CUDA vLLM for a GPU machine without a network.

    python -m tools.gpu.pack OUT [--cache DIR] [--limit BYTES] [--full]

Downloads vLLM's own CUDA wheel and the packages that such a machine lacks (350 MB, cached), leaves
out what no Hopper GPU can run, and writes OUT/part-1.tar, part-2.tar, ..., each of at most
58 MB, this checkout as OUT/project.tar, and OUT/SHA256SUMS. The first part is all that flashquant
needs; the last one has the kernels of 4-bit experts. Nothing but pip is needed; the first time, it
compresses for five minutes.
"""

from __future__ import annotations

import argparse
import hashlib
import inspect
import re
import subprocess
import sys
from pathlib import Path

from tools.gpu import archives, fatbin, packages
from tools.gpu.archives import Member, compressed, sha256
from tools.gpu.machine import commit
from tools.gpu.packages import PACKAGES, PLATFORMS, PYTHON, VLLM

_PROJECT = Path(__file__).parents[2]
_LIMIT = 58_000_000


def main(argv: list[str] | None = None) -> int:
    """Download, compress, write."""
    parser = argparse.ArgumentParser(
        prog="python -m tools.gpu.pack", description="carry vLLM to a GPU without a network"
    )
    parser.add_argument("out", type=Path)
    parser.add_argument("--cache", type=Path, default=Path("~/.cache/flashquant-gpu").expanduser())
    parser.add_argument("--limit", type=int, default=_LIMIT, help=f"bytes of a part ({_LIMIT:,})")
    parser.add_argument("--full", action="store_true", help="machine code of every GPU")
    chosen = parser.parse_args(argv)
    wheels = chosen.cache / "wheels"
    for folder in (chosen.out, wheels, chosen.cache / "archives"):
        folder.mkdir(parents=True, exist_ok=True)
    for requirements in ([VLLM], PACKAGES):
        _download(requirements, wheels)
    try:
        ready = _made(wheels, chosen.cache / "archives", full=chosen.full)
        written = archives.write_parts(ready, chosen.out, chosen.limit)
    except ValueError as error:
        raise SystemExit(f"error: {error}") from error
    written.append(archives.write_project(_PROJECT, chosen.out, commit(_PROJECT)))
    sums = [f"{sha256(path.read_bytes())}  {path.name}\n" for path in written]
    (chosen.out / "SHA256SUMS").write_text("".join(sums))
    for path in written:
        print(f"{path.stat().st_size:>11,} bytes  {path}")
    return 0


def _made(wheels: Path, cache: Path, *, full: bool) -> dict[str, Path]:
    """Each archive's file, made unless nothing has changed that could change what is in it."""
    vllm = wheel_of(VLLM, wheels)
    others = [wheel_of(need, wheels) for need in PACKAGES]
    made = {}
    for name, content in archives.archives(vllm, others, full=full):
        key = _key(content, PACKAGES if name == "deps" else [VLLM, str(full)])
        made[name] = path = cache / f"{name}-{key}.tar.xz"
        if not path.exists():
            print(f"compressing {name} ...", flush=True)
            unfinished = path.with_suffix(".tmp")
            unfinished.write_bytes(compressed(content))
            unfinished.rename(path)
    return made


def _key(content: list[Member], needs: list[str]) -> str:
    recipe = "".join(map(inspect.getsource, (fatbin, packages, archives.archives, compressed)))
    paths = [(member.path, member.mode) for member in content]
    return hashlib.sha256(repr((paths, needs, recipe)).encode()).hexdigest()[:12]


def _download(requirements: list[str], into: Path) -> None:
    """Wheels for the Python of the kit on Linux, x86-64, unless they are there."""
    missing = [need for need in requirements if _found(need, into) is None]
    if not missing:
        return
    print(f"downloading {len(missing)} of {len(requirements)} packages ...", flush=True)
    pip = [sys.executable, "-m", "pip", "--disable-pip-version-check", "download", "--quiet"]
    pip += ["--no-deps", "--only-binary=:all:", "--python-version", PYTHON]
    pip += ["--implementation", "cp", "--dest", str(into)]
    for abi in (f"cp{PYTHON.replace('.', '')}", "abi3", "none"):
        pip += ["--abi", abi]
    for platform in PLATFORMS:
        pip += ["--platform", platform]
    answer = subprocess.run([*pip, *missing], capture_output=True, text=True, check=False)
    if answer.returncode:
        raise SystemExit(f"error: pip could not download the packages.\n{answer.stderr}")


def wheel_of(requirement: str, folder: Path) -> Path:
    """The wheel of `name==version`.

    Raises:
        FileNotFoundError: it is not there.

    """
    found = _found(requirement, folder)
    if found is None:
        raise FileNotFoundError(f"{folder} holds no wheel of {requirement}")
    return found


def _found(requirement: str, folder: Path) -> Path | None:
    name, version = requirement.split("==")
    for wheel in folder.glob("*.whl"):
        its_name, its_version = wheel.name.split("-")[:2]
        if (_plain(its_name), its_version) == (_plain(name), version):
            return wheel
    return None


def _plain(name: str) -> str:
    """As package indexes compare names."""
    return re.sub(r"[-_.]+", "-", name).lower()


if __name__ == "__main__":
    raise SystemExit(main())
