"""The commands: what they print for a person or a machine, and their exit codes."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

import flashquant
from flashquant.cli.main import main
from flashquant.patches.diagnostics import doctor
from flashquant.patches.point import PatchPoint
from flashquant.profiles import load_profile
from tools.models import flashrl, tiny_models


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


def test_what_is_alike_is_said_once(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """Of 77 seams that fit, a person reads one line; what fails is a line of its own."""
    seams = [doctor.Finding("seams", f"seam{index}", "ok", "fits") for index in range(5)]
    moved = doctor.Finding("seams", "seam5", "fails", "is gone")
    monkeypatch.setattr("flashquant.patches.diagnostics.examine", lambda: [*seams, moved])

    assert main(["doctor"]) == 1

    said = " ".join(capsys.readouterr().out.split())
    assert "seam0 and 4 more fits" in said
    assert "fails seam5 is gone" in said
    assert "seam3" not in said


@pytest.mark.parametrize("config", ["", "int8"])
def test_it_says_whether_engines_would_be_patched(
    config: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("FLASHRL_CONFIG", config)
    monkeypatch.setattr("flashquant.patches.diagnostics.examine", list)

    main(["doctor"])

    said = " ".join(capsys.readouterr().out.split())
    assert ("is int8: flashquant config says" if config else "is not set: engines") in said


@pytest.mark.parametrize("amx", [True, False])
def test_a_scheme_without_a_kernel_here_is_not_called_well(
    amx: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delenv("FLASHQUANT_EMULATE", raising=False)
    monkeypatch.setattr("torch.cpu._is_amx_tile_supported", lambda: amx)

    verdicts = {f.name: f.verdict for f in doctor.examine() if f.topic == "schemes"}

    on_a_cpu = bool(doctor.current_platform.is_cpu())
    assert verdicts["fp8_block"] == ("ok" if amx or not on_a_cpu else "skipped")
    assert verdicts["mxfp8"] == verdicts["nvfp4"] == ("skipped" if on_a_cpu else "ok")


def test_an_interrupted_command_ends_without_a_traceback(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def interrupted() -> list[doctor.Finding]:
        raise KeyboardInterrupt

    monkeypatch.setattr("flashquant.patches.diagnostics.examine", interrupted)

    assert main(["doctor"]) == 130
    assert capsys.readouterr().err == "interrupted\n"


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
        codes, scales = doctor.DEFINITIONS["int8"](weight)
        quantize.calls += 1
        if broken == "other bits":
            codes[0, 0] += quantize.calls % 2
        else:
            codes //= 2
        return codes, scales

    quantize.calls = 0
    monkeypatch.setattr(doctor, "DEFINITIONS", {**doctor.DEFINITIONS, "int8": quantize})

    (failed,) = [f for f in doctor.examine() if f.verdict == "fails"]

    assert failed.name == "int8 on cpu"


def test_without_a_command_it_says_how_it_is_used(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as ended:
        main([])

    assert ended.value.code == 2
    assert "doctor" in capsys.readouterr().err


@pytest.fixture(scope="module")
def calibrated(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with a W8A8 checkpoint and FlashRL's profile of it."""
    folder = tmp_path_factory.mktemp("calibrated")
    bf16 = tiny_models.make("llama", 0, folder / "bf16", hidden=128)
    w8a8 = flashrl.make_smoothed(bf16, folder / "w8a8")
    torch.save(flashrl.make_profile(bf16, w8a8), folder / "old.pt")
    return folder


def test_a_profile_of_flashrl_is_converted(
    calibrated: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    new, old = tmp_path / "new.safetensors", calibrated / "old.pt"

    assert main(["profile", "convert", str(old), str(new)]) == 0

    assert "18 weights, of a checkpoint that nobody noted" in capsys.readouterr().out
    assert set(load_profile(new).entries) == set(load_profile(old).entries)


def test_the_checkpoint_of_a_profile_is_checked_and_noted(
    calibrated: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    new, w8a8 = tmp_path / "new.safetensors", str(calibrated / "w8a8")
    convert = ["profile", "convert", str(calibrated / "old.pt"), str(new)]

    assert main([*convert, "--model", w8a8, "--revision", "abc"]) == 0
    assert main(["profile", "inspect", str(new)]) == 0

    said = capsys.readouterr().out.replace("\n", "")
    assert "@abc, 5 fingerprints" in said
    assert "128 x 512" in said
    assert load_profile(new).base.model == w8a8  # type: ignore[union-attr]


def test_a_profile_of_another_checkpoint_is_not_converted(
    calibrated: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    other = flashrl.make_smoothed(calibrated / "bf16", tmp_path / "other", seed=1)
    new = tmp_path / "new.safetensors"
    convert = ["profile", "convert", str(calibrated / "old.pt"), str(new)]

    assert main([*convert, "--model", str(other)]) == 1

    assert "does not fit this checkpoint" in capsys.readouterr().err
    assert not new.exists()


@pytest.mark.parametrize("verb", ["inspect", "convert"])
def test_a_profile_that_is_not_there_is_one_line(
    verb: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["profile", verb, "no.pt", *(["new.safetensors"] if verb == "convert" else [])])

    said = capsys.readouterr().err
    assert said.startswith("error: there is no file")
    assert said.count("\n") == 1
