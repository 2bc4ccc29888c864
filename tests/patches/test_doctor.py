"""What the doctor compares on a GPU: `cpu:0` stands for one, since it is not called `cpu`."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from flashquant.patches.diagnostics import doctor

ZEROS = 7  # the row of zeros in what the doctor quantizes


def found(monkeypatch: pytest.MonkeyPatch, **other: float) -> doctor.Finding:
    """Beside a kernel that does what ours does, but for one scale, or one code."""

    def theirs(weight: Tensor) -> tuple[Tensor, Tensor]:
        codes, scales = doctor.DEFINITIONS["int8"](weight)
        for name, value in other.items():
            row = ZEROS if name.endswith("of_zeros") else ZEROS + 1
            (codes if name.startswith("code") else scales)[row, 0] = value
        return codes, scales

    monkeypatch.setitem(doctor._VLLMS, "int8", theirs)
    return doctor._as_vllms("int8", doctor.DEFINITIONS["int8"], doctor._weight(), "cpu:0")


def test_a_row_of_zeros_may_have_another_scale(monkeypatch: pytest.MonkeyPatch) -> None:
    """vLLM's CUDA kernel gives it 0, and ours 1/127: its codes are zeros, and mean zeros."""
    finding = found(monkeypatch, scale_of_zeros=0.0)

    assert finding.verdict == "ok"
    assert "rows that are not all zeros" in finding.detail
    assert "theirs of zeros are 0" in finding.detail


def test_the_scale_of_any_other_row_counts(monkeypatch: pytest.MonkeyPatch) -> None:
    finding = found(monkeypatch, scale_of_zeros=0.0, scale=0.0)

    assert (finding.verdict, finding.detail) == ("fails", "1 of 131 scales differ")


@pytest.mark.parametrize("where", ["code", "code_of_zeros"])
def test_every_code_counts(where: str, monkeypatch: pytest.MonkeyPatch) -> None:
    finding = found(monkeypatch, **{where: 99})

    assert (finding.verdict, finding.detail) == ("fails", "1 of 50304 codes differ")


def test_kernels_that_cannot_be_compiled_are_a_finding(monkeypatch: pytest.MonkeyPatch) -> None:
    fused = pytest.importorskip("flashquant.schemes.fused")

    def difference(device: torch.device) -> None:
        raise RuntimeError("Failed to find C compiler")

    monkeypatch.setattr(fused, "difference", difference)

    finding = doctor._triton("cpu:0")

    assert finding.verdict == "fails"
    assert "Failed to find C compiler" in finding.detail
