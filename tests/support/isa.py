"""Which vector instructions this process has; FLASHQUANT_PRETEND_ISA takes some away.

    FLASHQUANT_PRETEND_ISA=avx2          no AVX-512: vLLM loads its build for AVX2
    FLASHQUANT_PRETEND_ISA=avx512        none of BF16, VNNI, VBMI: vLLM's build for Skylake
    FLASHQUANT_PRETEND_ISA=avx512_bf16   all there is but AMX

Nothing is ever added: where the CPU has less than that, the variable changes nothing. What is
taken away is so for vLLM, which asks `torch.cpu` and loads the build that fits; for torch,
oneDNN and MKL; for flashquant's kernels in C, whose compiler is told so; and for every Python
started by such a process. (torch's fp8 matmul asks the CPU itself whether it has AMX.)

conftest calls `pretend` before anything imports torch; `pretence/` has what others need to do so.
"""

from __future__ import annotations

import importlib.machinery
import os
import sys
from collections.abc import Callable, Mapping, MutableMapping, Sequence
from importlib.machinery import ModuleSpec
from pathlib import Path
from types import MappingProxyType, ModuleType
from typing import Any

VARIABLE = "FLASHQUANT_PRETEND_ISA"
FP8_IS_LOST = "torch sees AMX, and its oneDNN is told not to: no real CPU is so"
LEVELS = ("none", "avx2", "avx512", "avx512_bf16", "amx")

_FLAGS = {"avx2": "avx2", "avx512": "avx512f", "avx512_bf16": "avx512_bf16", "amx": "amx_tile"}
_FOLDER = Path(__file__).parent / "pretence"
# What `avx512` still has, as torch names it: the instructions of Skylake.
_SKYLAKE = {f"avx512_{part}" for part in ("f", "cd", "dq", "bw", "vl")}
_ASKED = {
    "_is_avx512_supported": "avx512_f",
    "_is_avx512_bf16_supported": "avx512_bf16",
    "_is_vnni_supported": "avx512_vnni",
    "_is_amx_tile_supported": "amx_tile",
    "_is_amx_fp16_supported": "amx_fp16",
}


def of(cpuinfo: str) -> str:
    """The level of a CPU, from what Linux says about it."""
    lines = [line for line in cpuinfo.splitlines() if line.startswith("flags")]
    flags = set(lines[0].split()) if lines else set[str]()
    return max((level for level in _FLAGS if _FLAGS[level] in flags), key=_rank, default="none")


def pretended(cpu: str, wanted: str | None) -> str | None:
    """The level to pretend on a CPU of another one; None to leave everything as it is.

    Raises:
        ValueError: there is no such level.

    """
    if not wanted:
        return None
    if wanted not in LEVELS[1:]:
        raise ValueError(f"{VARIABLE}={wanted}, but it has to be one of {', '.join(LEVELS[1:])}")
    return wanted if _rank(wanted) < _rank(cpu) else None


def lacks(level: str, capability: str) -> bool:
    """Whether a capability of torch's is above a level."""
    if capability.startswith("amx"):
        return level != "amx"
    if not capability.startswith(("avx512", "avx10")):
        return False
    return level == "avx2" or (level == "avx512" and capability not in _SKYLAKE)


def pretend(environ: MutableMapping[str, str] = os.environ) -> None:
    """Do as the variable says, in this process and in those that it starts."""
    level = pretended(of(_cpuinfo()), environ.get(VARIABLE))
    if level is None:
        return
    environ.update(_environment(level))
    path = environ.get("PYTHONPATH", "").split(os.pathsep)
    if str(_FOLDER) not in path:
        environ["PYTHONPATH"] = os.pathsep.join([str(_FOLDER), *filter(None, path)])
    if (cpu := sys.modules.get("torch.cpu")) is not None:
        _take_away(cpu, level)
    elif not any(isinstance(finder, _Watch) for finder in sys.meta_path):
        sys.meta_path.insert(0, _Watch(level))


def breaks_fp8(environ: Mapping[str, str] = os.environ) -> bool:
    """Whether torch hands fp8 to a oneDNN that may not use the AMX which torch sees: vLLM's
    processes that are started anew then cannot multiply it. No real CPU is like that."""
    cpu = of(_cpuinfo())
    return cpu == "amx" and pretended(cpu, environ.get(VARIABLE)) is not None


def _rank(level: str) -> int:
    return LEVELS.index(level)


def _cpuinfo() -> str:
    file = Path("/proc/cpuinfo")
    return file.read_text() if file.exists() else ""


def _environment(level: str) -> Mapping[str, str]:
    """What torch, MKL, oneDNN (torch's and vLLM's) and flashquant's build listen to."""
    width = "avx2" if level == "avx2" else "avx512"
    onednn = {"avx2": "AVX2", "avx512": "AVX512_CORE", "avx512_bf16": "AVX512_CORE_BF16"}
    said = {
        "ATEN_CPU_CAPABILITY": width,
        "MKL_ENABLE_INSTRUCTIONS": width.upper(),
        "ONEDNN_MAX_CPU_ISA": onednn[level],
    }
    # The last -march counts. With BF16, `native` is right: nothing in C is for AMX.
    return said if level == "avx512_bf16" else {**said, "CC": str(_FOLDER / f"cc-{level}")}


def _take_away(cpu: ModuleType, level: str) -> None:
    for name, capability in _ASKED.items():
        if hasattr(cpu, name) and lacks(level, capability):
            setattr(cpu, name, lambda: False)
    if (ask := getattr(cpu, "get_capabilities", None)) is not None:  # since torch 2.13
        cpu.get_capabilities = _without(level, ask)  # type: ignore[attr-defined]


def _without(level: str, ask: Callable[[], Mapping[str, Any]]) -> Callable[[], Mapping[str, Any]]:
    left = {
        name: False if lacks(level, name) and there is True else there
        for name, there in ask().items()
    }
    return lambda: MappingProxyType(left)


class _Watch:
    """Waits for torch.cpu to be imported: nothing else here needs torch."""

    def __init__(self, level: str) -> None:
        self._level = level

    def find_spec(
        self, name: str, path: Sequence[str] | None = None, target: ModuleType | None = None
    ) -> ModuleSpec | None:
        if name != "torch.cpu":
            return None
        spec = importlib.machinery.PathFinder.find_spec(name, path, target)
        if spec is None or spec.loader is None:
            return spec
        run, level = spec.loader.exec_module, self._level

        def run_and_take_away(module: ModuleType) -> None:
            run(module)
            _take_away(module, level)

        spec.loader.exec_module = run_and_take_away  # type: ignore[method-assign]
        return spec
