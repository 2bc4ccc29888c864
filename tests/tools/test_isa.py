"""What a pretended CPU is, and that vLLM, torch and children of children believe it."""

from __future__ import annotations

import os
import subprocess
import sys
from typing import Any

import pytest
import torch

from tests.support import fp8, isa

_XEON = "processor: 0\nflags\t\t: fpu avx2 avx512f avx512_bf16 amx_tile\n"


@pytest.mark.parametrize(
    ("cpuinfo", "level"),
    [
        (_XEON, "amx"),
        (_XEON.replace("amx_tile", ""), "avx512_bf16"),
        ("flags : avx2 avx512f", "avx512"),
        ("flags : avx2", "avx2"),
        ("Features : asimd", "none"),
    ],
)
def test_the_level_of_a_cpu_is_the_best_of_its_flags(cpuinfo: str, level: str) -> None:
    assert isa.of(cpuinfo) == level


@pytest.mark.parametrize("cpu", isa.LEVELS)
@pytest.mark.parametrize("wanted", isa.LEVELS[1:])
def test_pretending_lowers_and_never_raises(cpu: str, wanted: str) -> None:
    lower = isa.LEVELS.index(wanted) < isa.LEVELS.index(cpu)

    assert isa.pretended(cpu, wanted) == (wanted if lower else None)


def test_a_level_that_does_not_exist_is_refused() -> None:
    with pytest.raises(ValueError, match="=sse, but it has to be one of avx2, avx512, "):
        isa.pretended("amx", "sse")


@pytest.mark.parametrize(
    ("level", "lacked"),
    [
        ("avx2", ["avx512_f", "avx512_vnni", "amx_tile"]),
        ("avx512", ["avx512_vnni", "amx_tile"]),
        ("avx512_bf16", ["amx_tile"]),
    ],
)
def test_each_level_lacks_what_is_above_it(level: str, lacked: list[str]) -> None:
    asked = ["avx2", "avx512_f", "avx512_vnni", "amx_tile"]

    assert [name for name in asked if isa.lacks(level, name)] == lacked


_PROGRAM = """
import subprocess, sys
if len(sys.argv) > 1:
    from tests.support import isa
    isa.pretend()
from vllm import _custom_ops
import torch
loaded = "_C_AVX2" in open("/proc/self/maps").read()
print(torch.cpu._is_avx512_supported(), torch.backends.cpu.get_cpu_capability(), loaded, flush=True)
if len(sys.argv) > 1:
    subprocess.run([sys.executable, "-c", sys.argv[1]])
"""


@pytest.mark.engine
@pytest.mark.skipif(isa.of(isa._cpuinfo()) == "none", reason="no CPU with AVX2")
def test_vllm_loads_its_avx2_build_here_and_in_a_child() -> None:
    said = subprocess.run(
        [sys.executable, "-c", _PROGRAM, _PROGRAM],
        env={**os.environ, isa.VARIABLE: "avx2"},
        capture_output=True,
        text=True,
        check=True,
    ).stdout

    assert [line for line in said.splitlines() if "AVX2" in line] == ["False AVX2 True"] * 2


def test_fp8_is_multiplied_without_onednn_and_nothing_else_is(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    seen: list[Any] = []
    monkeypatch.setattr(torch, "_scaled_mm", lambda: seen.append(torch._C._get_mkldnn_enabled()))
    fp8.multiply_as_everywhere.__wrapped__()

    torch._scaled_mm()

    assert seen == [False]
    assert torch._C._get_mkldnn_enabled()
