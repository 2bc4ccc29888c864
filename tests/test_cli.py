"""`flashquant doctor`: for a person, for a machine, and by its exit code."""

from __future__ import annotations

import json
from collections.abc import Iterator

import pytest

import flashquant
from flashquant.cli import main
from flashquant.patches import doctor
from flashquant.patches.point import PatchPoint


@pytest.fixture(autouse=True)
def unpatched() -> Iterator[None]:
    """Seams are looked at unwrapped; engines of other test files are patched again."""
    was_patched = flashquant.is_patched()
    flashquant.unpatch()
    yield
    if was_patched:
        flashquant.patch()


def test_on_this_machine_all_is_well(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["doctor"]) == 0

    said = capsys.readouterr().out
    assert "all is well" in said
    for topic in ("versions", "seams", "hardware", "schemes", "kernels"):
        assert topic in said


def test_for_machines_it_is_json(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["doctor", "--json"]) == 0

    findings = json.loads(capsys.readouterr().out)
    assert {finding["verdict"] for finding in findings} <= {"ok", "skipped"}
    assert any(finding["name"] == "int8 on cpu" for finding in findings)


def test_a_seam_that_moved_fails_by_name(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    moved = PatchPoint("vllm.v1.worker.gpu_worker:Worker.gone", expects=("self",), wrapper=print)
    monkeypatch.setattr("flashquant.patches.POINTS", (moved,))

    assert main(["doctor", "--json"]) == 1

    findings = json.loads(capsys.readouterr().out)
    (failed,) = [finding for finding in findings if finding["verdict"] == "fails"]
    assert failed["name"] == moved.target


def test_a_version_outside_the_tested_range_fails(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("vllm.__version__", "0.10.0")

    failed = [f for f in doctor.examine() if f.verdict == "fails"]

    assert [finding.name for finding in failed] == ["vllm"]


@pytest.mark.parametrize("broken", ["other bits", "coarse"])
def test_a_kernel_that_computes_something_else_fails(
    monkeypatch: pytest.MonkeyPatch, broken: str
) -> None:
    def quantize(weight):  # type: ignore[no-untyped-def]
        codes, scales = doctor.int8_channel(weight)
        quantize.calls += 1
        if broken == "other bits":
            codes[0, 0] += quantize.calls % 2
        else:
            codes //= 2
        return codes, scales

    quantize.calls = 0
    monkeypatch.setitem(doctor._DEFINITIONS, "int8", quantize)

    (failed,) = [f for f in doctor.examine() if f.verdict == "fails"]

    assert failed.name == "int8 on cpu"


def test_without_a_command_it_says_how_it_is_used(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as ended:
        main([])

    assert ended.value.code == 2
    assert "doctor" in capsys.readouterr().err
