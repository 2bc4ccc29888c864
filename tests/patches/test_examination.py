"""What `doctor --engine` and `doctor --gpu` find, and that nothing ends them early."""

from __future__ import annotations

import gc
import json
import os
from pathlib import Path
from typing import Any

import pytest
import torch
from torch.multiprocessing.reductions import StorageWeakRef
from vllm.v1.worker import workspace

from flashquant.cli.main import main
from flashquant.config import schemes
from flashquant.patches.diagnostics import bench, doctor
from flashquant.patches.diagnostics.examination import engines, front, policies, speed
from flashquant.patches.diagnostics.examination.front import Serving
from flashquant.patches.diagnostics.examination.programs import last_words
from flashquant.patches.diagnostics.examination.speed import timings
from tests.engine.kernels import want_int4
from tests.engine.serving import choosing
from tests.support.groups import make_experts_group

STEPS = ["vllm", "start", "runner", "bytes", "addresses", "outputs", "back"]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("policies")
    policies.write(path)
    return path


@pytest.fixture(scope="module")
def folders(folder: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """By model."""
    made = {policies.DENSE: folder}
    for model in policies.MODELS[1:]:
        made[model] = tmp_path_factory.mktemp(model)
        policies.write(made[model], model)
    return made


def verdicts(folder: Path, scheme: str) -> dict[str, tuple[str, str]]:
    steps = engines.examine(scheme, folder)
    return {step.name: (step.verdict, step.detail) for step in steps if step.verdict != "begun"}


@pytest.mark.engine
@pytest.mark.parametrize("scheme", engines.SCHEMES)
def test_each_scheme_is_served_pushed_to_and_found_well(
    scheme: str, folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    want_int4(scheme)
    emulated = schemes.SCHEMES[scheme].emulated
    monkeypatch.setenv("FLASHQUANT_EMULATE", "1")
    # vLLM's blocks of fp8 want AMX; its kernels for it run on AVX-512, too.
    with choosing("amx" if scheme == "fp8_block" else "native"):
        found = verdicts(folder, scheme)

    assert list(found) == ["fresh" if emulated else "vllm", *STEPS[1:]]
    assert {verdict for verdict, _ in found.values()} == {"ok"}
    assert f"as {'a fresh start' if emulated else 'vLLM alone'} loads them" in found["bytes"][1]
    assert found["runner"][1].startswith("V")


@pytest.mark.engine
@pytest.mark.parametrize("scheme", ["bf16", "int8", "fp8_block"])
@pytest.mark.parametrize("model", policies.MODELS[1:])
def test_mixtures_and_compressed_attention_are_found_well(
    model: str, scheme: str, folders: dict[str, Path]
) -> None:
    make_experts_group()  # vLLM makes one only where a mixture is a process's first model
    with choosing("native" if scheme == "bf16" else "amx"):  # vLLM's experts of 8 bit want AMX
        found = verdicts(folders[model], scheme)

    # vLLM's online load quantizes Qwen3-MoE's routers, so that it is no measure there.
    compared_with = "fresh" if (model, scheme) == ("qwen3-moe", "fp8_block") else "vllm"
    assert list(found) == [compared_with, *STEPS[1:]]
    assert {verdict for verdict, _ in found.values()} == {"ok"}


@pytest.mark.engine
def test_one_weight_that_is_another_is_found(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The proof that the comparison compares: what is pushed is not quite what vLLM loads."""
    truth = policies.tensors

    def a_little_off(path: Path) -> dict[str, torch.Tensor]:
        sent = truth(path)
        sent["model.layers.1.mlp.down_proj.weight"][0] *= 2
        return sent

    monkeypatch.setattr(policies, "tensors", a_little_off)

    found = verdicts(folder, "fp8_channel")

    assert [name for name, (verdict, _) in found.items() if verdict == "fails"] == [
        "bytes",
        "outputs",
        "back",
    ]
    assert "model.layers.1.mlp.down_proj.weight" in found["bytes"][1]


@pytest.mark.engine
def test_a_scheme_in_a_program_of_its_own(capsys: pytest.CaptureFixture[str]) -> None:
    """The whole command, as a person runs it."""
    assert main(["doctor", "--engine", "--scheme", "int8", "--json"]) == 0

    findings = json.loads(capsys.readouterr().out)
    found = [f["name"] for f in findings if f["topic"] == "engine in int8"]
    assert found == STEPS
    assert findings[-1]["topic"] == "verdict"
    assert findings[-1]["detail"].endswith("int8 ok")


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
def test_without_a_gpu_it_says_so_and_fails(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["doctor", "--gpu", "--json"]) == 1

    (failed,) = [f for f in json.loads(capsys.readouterr().out) if f["verdict"] == "fails"]
    assert "torch sees no GPU" in failed["detail"]
    assert "doctor --engine" in failed["detail"]


def test_a_gpu_that_vllm_does_not_serve_on_is_said_too(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("torch.cuda.is_available", lambda: True)

    (finding,) = front.examine_engines(Serving(mode="compiled"), gpu=True)

    assert finding.verdict == "fails"
    assert "vLLM for CUDA" in finding.detail


def test_a_scheme_that_is_none_is_one_line(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["doctor", "--engine", "--scheme", "int3"]) == 1

    assert "there is no scheme int3; choose from bf16, int8" in capsys.readouterr().err


@pytest.fixture(params=["vllm", "start", "import"])
def dying(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> str:
    """A program that is killed in a step."""
    monkeypatch.setattr(front, "_PROGRAM", "tests.engine.programs.dying")
    monkeypatch.setitem(os.environ, "DIES_IN", request.param)
    return str(request.param)


def test_a_program_that_is_killed_is_a_finding(dying: str, tmp_path: Path) -> None:
    """Where vLLM alone dies, it is not flashquant that fails."""
    last = list(front._examine("int8", tmp_path, Serving()))[-1]

    assert (last.topic, last.name) == ("engine in int8", dying)
    assert last.verdict == ("skipped" if dying == "vllm" else "fails")
    assert "ValueError: the kernel wants more" in last.detail
    assert ("exit code -11" in last.detail) == (dying != "vllm")


def test_a_scheme_that_hangs_is_ended_and_keeps_what_it_found(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(front, "_PROGRAM", "tests.engine.programs.dying")
    monkeypatch.setitem(os.environ, "DIES_IN", "start")
    monkeypatch.setitem(os.environ, "HANGS", "1")

    found = list(front._examine("int8", tmp_path, Serving(seconds=2)))

    assert [(f.name, f.verdict) for f in found] == [("vllm", "ok"), ("start", "fails")]
    assert found[-1].detail == "no end after 2 seconds: ValueError: the kernel wants more"


def test_an_exception_is_told_in_all_its_lines(tmp_path: Path) -> None:
    log = tmp_path / "log"
    log.write_text(
        "[rank0]: Traceback (most recent call last):\n[rank0]:     raise ValueError(\n"
        "[rank0]: ValueError: no kernel. Reasons:\n[rank0]: it wants [AMX]\n"
    )

    assert last_words(log) == "ValueError: no kernel. Reasons: it wants [AMX]"


def test_the_verdict_is_one_line_and_brackets_are_brackets(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    long = "flashquant on a machine " + "with a long name " * 12
    found = [
        front.Finding("engine in int8", "vllm", "skipped", "[rank0] says no"),
        front.Finding("verdict", "engines", "ok", long),
    ]
    monkeypatch.setattr(front, "examine_engines", lambda *_, **__: found)
    monkeypatch.setattr("flashquant.patches.diagnostics.doctor.examine", list)

    assert main(["doctor", "--engine"]) == 0

    said = capsys.readouterr().out
    assert long in said
    assert "[rank0] says no" in said


def test_the_verdict_tells_who_fails() -> None:
    def found(scheme: str, verdict: Any) -> front.Finding:
        return front.Finding(f"engine in {scheme}", "bytes", verdict, "")

    findings = [found("int8", "ok"), found("fp8_block", "fails"), found("fp8_channel", "skipped")]
    findings.append(front.Finding("engine in int8", "runner", "ok", "V2 (gpu.model_runner), Flash"))
    verdict = front._verdict(findings, torch.device("cpu"), Serving(mode="graphs"))

    assert verdict.verdict == "fails"
    assert "int8 ok, fp8_block FAILS, fp8_channel not served by vLLM" in verdict.detail
    assert "llama, graphs, runner V2: " in verdict.detail


def test_findings_are_lines_for_programs_that_wait(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["doctor", "--lines"]) == 0

    lines = [json.loads(line) for line in capsys.readouterr().out.splitlines()]
    assert {"topic", "name", "verdict", "detail"} == set().union(*lines)


@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        (["--engine", "--mode", "fast"], "there is no mode fast; choose from eager, graphs"),
        (["--engine", "--model", "gpt"], "there is no model gpt; choose from llama"),
        (["--engines-only"], "add --engine or --gpu"),
    ],
)
def test_what_the_doctor_cannot_do_is_one_line(
    arguments: list[str], says: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["doctor", *arguments]) == 1

    assert says in " ".join(capsys.readouterr().err.split())


def test_an_engine_leaves_room_on_a_gpu_for_others(monkeypatch: pytest.MonkeyPatch) -> None:
    """vLLM takes nearly all of it by default, and refuses to start beside another engine."""
    shares = []
    monkeypatch.setattr(bench, "LLM", lambda *_, **options: shares.append(options))
    monkeypatch.setattr("torch.cuda.is_available", lambda: True)

    for _ in range(8):
        bench.start(Path("x"), None)

    assert sum(options["gpu_memory_utilization"] for options in shares) < 0.9


def test_a_kernel_that_does_not_run_is_a_finding_and_not_the_end(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    def broken(*_: object) -> Any:
        raise RuntimeError("no kernel image is available")

    monkeypatch.setattr(doctor, "DEFINITIONS", {**doctor.DEFINITIONS, "int8": broken})
    monkeypatch.setattr(speed, "int8_channel", broken)

    found = [*doctor._kernels(), *timings(torch.device("cpu"))]

    failed = [finding for finding in found if finding.verdict == "fails"]
    assert {finding.name for finding in failed} == {"int8 on cpu"}
    assert {finding.topic for finding in failed} == {"kernels", "speed"}
    assert "no kernel image" in failed[0].detail
    assert any(finding.name == "fp8_channel on cpu" for finding in found)


def test_speeds_are_beside_the_copy_limit() -> None:
    found = list(timings(torch.device("cpu")))

    assert [finding.name for finding in found] == [
        "int8 on cpu",
        "fp8_channel on cpu",
        "fp8_tensor on cpu",
        "fp8_vllm on cpu",
    ]
    assert all("times the copy limit of" in finding.detail for finding in found)


def test_what_captured_graphs_of_experts_write_into_outlives_the_next_engine(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """vLLM has one workspace of experts' kernels a process, and each engine brings a new one.

    With stand-ins for engines: freed, it would be anything of the second engine's by then.
    """
    made: list[Any] = []

    def start(*_: Any, **__: Any) -> None:
        workspace.init_workspace_manager(torch.device("cpu"))
        (memory,) = workspace.current_workspace_manager().get_simultaneous(((64,), torch.uint8))
        made.append(StorageWeakRef(memory.untyped_storage()))

    monkeypatch.setattr(torch.accelerator, "empty_cache", lambda: None)
    monkeypatch.setattr(workspace, "_manager", None)
    monkeypatch.setattr(engines, "LLM", start)
    monkeypatch.setattr(engines, "_alive", [])
    for _ in range(2):
        engines._serve(tmp_path, {})
    gc.collect()

    assert [one.expired() for one in made] == [False, False]
