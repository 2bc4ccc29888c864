"""The Triton kernels return the bits of the definitions: here in Triton's interpreter."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest

pytest.importorskip("triton")

SMOOTHED = tuple(
    f"{kernel}{scales}"
    for kernel in ("int8_frozen", "int8_refreshed")
    for scales in ("", "_rows", "_columns", "_rows_columns")
)
BOUND = ("int8_channel_bound", "fp8_channel_bound")
TELLING = ("absmax", "int8_channel", "fp8_channel", "fp8_tensor", "fp8_tensors", *BOUND, *SMOOTHED)
KERNELS = (*TELLING, "fp8_static", "fp8_static_rows")
DTYPES = ("bfloat16", "float16", "float32")
SHAPES = (
    "ragged",
    "one-column",
    "several-blocks",
    "no-rows",
    "zeros",
    "transposed",
    "window",
    "halfway",
    "tiny",
    "far",
)


@pytest.fixture(scope="module")
def different(tmp_path_factory: pytest.TempPathFactory) -> dict[str, list[int]]:
    """Which results of which case have other bits."""
    answer = tmp_path_factory.mktemp("fused") / "answer.json"
    program = Path(__file__).parent / "programs/fused.py"
    subprocess.run([sys.executable, str(program), str(answer)], check=True, timeout=300)
    found: dict[str, list[int]] = json.loads(answer.read_text())
    return found


@pytest.mark.parametrize("kernel", KERNELS)
@pytest.mark.parametrize("dtype", DTYPES)
def test_every_bit_is_that_of_the_definition(
    kernel: str, dtype: str, different: dict[str, list[int]]
) -> None:
    """Codes, scales and counts, whatever the shape, the strides and the offset."""
    cases = {
        shape: different[f"{kernel}-{dtype}-{shape}"]
        for shape in SHAPES
        if f"{kernel}-{dtype}-{shape}" in different
    }

    assert len(cases) >= len(SHAPES) - 1
    assert {shape: results for shape, results in cases.items() if results} == {}


@pytest.mark.parametrize("bad", ["nan", "inf", "-inf"])
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("kernel", TELLING)
def test_what_is_not_finite_shows_in_the_scale(
    kernel: str, dtype: str, bad: str, different: dict[str, list[int]]
) -> None:
    assert different[f"{kernel}-{dtype}-{bad}"] == []


def test_what_a_gpu_is_asked_before_it_is_believed_passes_here(
    different: dict[str, list[object]],
) -> None:
    assert different["difference"] == ["None"]
