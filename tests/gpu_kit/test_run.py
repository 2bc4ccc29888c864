"""Whatever a step does, the page tells; no step can keep the others from running."""

from __future__ import annotations

import os
import time
from collections.abc import Callable
from pathlib import Path

import pytest

from tools.gpu import environment, page, runner, steps
from tools.gpu.page import Fact
from tools.gpu.runner import Runner
from tools.gpu.steps import Step, Way

FACT = 'print(\'{"name": "a", "verdict": "%s", "detail": "seen"}\', flush=True);'
Run = Callable[..., list[Fact]]


def step(name: str, code: str, seconds: int = 30, **more: object) -> Step:
    return Step(name, ("-c", code), seconds, **more)  # type: ignore[arg-type]


@pytest.fixture
def run(tmp_path: Path) -> Run:
    def run(*found: Step, budget: float = 60) -> list[Fact]:
        told: list[Fact] = []
        runs = Runner(os.environ, tmp_path, budget=budget, jobs=2, tell=told.append)
        runs.run(found)
        assert told == runs.facts
        return runs.facts

    return run


def test_what_a_program_tells_is_passed_on(run: Run) -> None:
    (fact,) = run(step("s", "print('noise');" + FACT % "ok"))

    assert (fact.step, fact.name, fact.verdict, fact.detail) == ("s", "a", "ok", "seen")


def test_a_crash_is_a_fact_and_what_was_told_before_it_stays(run: Run) -> None:
    told, crash = run(step("s", FACT % "ok" + "raise ValueError('no kernel')"))

    assert told.verdict == "ok"
    assert (crash.verdict, crash.detail) == ("fails", "exit code 1: ValueError: no kernel")


def test_a_failure_that_was_told_is_not_told_twice(run: Run) -> None:
    (fact,) = run(step("s", FACT % "fails" + "raise SystemExit(1)"))

    assert (fact.name, fact.verdict) == ("a", "fails")


def test_a_program_that_tells_nothing_fails(run: Run) -> None:
    (fact,) = run(step("s", "print('hello')"))

    assert fact.verdict == "fails"


def test_a_program_that_hangs_is_ended_with_what_it_has_started(run: Run, tmp_path: Path) -> None:
    alive = tmp_path / "alive"
    child = f"import time, pathlib\nwhile 1: pathlib.Path({str(alive)!r}).touch(); time.sleep(.05)"
    code = f"import subprocess, sys, time; subprocess.Popen([sys.executable, '-c', {child!r}]);"

    told, late = run(step("s", code + FACT % "ok" + "time.sleep(60)", seconds=2))

    assert (told.verdict, late.verdict) == ("ok", "late")
    alive.unlink()
    time.sleep(0.5)
    assert not alive.exists()


def test_steps_for_which_no_time_is_left_are_told(run: Run) -> None:
    (fact,) = run(step("s", FACT % "ok"), budget=1)

    assert (fact.verdict, fact.detail) == ("skipped", "not begun, for want of time")


def test_the_way_in_which_vllm_serves_is_kept(run: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    """Where vLLM's own choice does not run, the steps after it do not fail for the same reason."""
    monkeypatch.setattr(runner, "WAYS", (Way(), Way(env={"WAY": "2"}), Way(env={"WAY": "3"})))
    code = "import os; well = os.environ.get('WAY') == '2'; kind = 'ok' if well else 'skipped';"
    code += 'print(f\'{{"name": "a", "verdict": "{kind}", "detail": ""}}\')'

    first, second, settings, later = run(
        step("serve", code, tries_ways=True), step("eager-x", code)
    )

    assert [first.verdict, second.verdict, later.verdict] == ["skipped", "ok", "ok"]
    assert settings.detail == "from here on: WAY=2"


def test_programs_that_run_at_once_share_the_cores(
    run: Run, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A thread a core in each of six took the first engine from one minute to four."""
    monkeypatch.delenv("OMP_NUM_THREADS", raising=False)
    monkeypatch.setattr(os, "cpu_count", lambda: 16)
    code = (
        "import json, os;"
        "threads = os.environ.get('OMP_NUM_THREADS', 'all');"
        "print(json.dumps({'name': 'a', 'verdict': 'ok', 'detail': threads}))"
    )

    shared, alone = run(step("s", code), step("measures", code, is_alone=True))

    assert (shared.detail, alone.detail) == ("8", "all")


def test_steps_are_taken_in_the_order_in_which_they_are_asked_for(tmp_path: Path) -> None:
    every = steps.steps("cuda", tmp_path, tmp_path)

    found = steps.chosen(every, ["bench-kernels", "tests-on_gpu", "graphs"], ["graphs-int4"])

    names = [step.name for step in found]
    assert names[:3] == ["machine", "bench-kernels", "tests-on_gpu"]
    assert names[3] == "graphs-fp8_channel"
    assert not [name for name in names if name.startswith("graphs-int4")]


def test_neighbours_run_at_once_but_what_measures_or_decides_never() -> None:
    names = ["serve", "eager-a", "more-b", "bench-a", "bench-b", "more-a"]
    found = [
        step(name, "", is_alone=name.startswith("bench"), tries_ways=name == "serve")
        for name in names
    ]

    groups = [[one.name for one in group] for group in runner.in_groups(found)]

    assert groups == [["serve"], ["eager-a", "more-b"], ["bench-a"], ["bench-b"], ["more-a"]]


@pytest.mark.parametrize("device", ["cuda", "cpu"])
def test_every_benchmark_is_a_step_and_names_are_unique(device: str, tmp_path: Path) -> None:
    from benchmarks.gpu.parts import PARTS

    found = steps.steps(device, tmp_path, tmp_path)

    assert len({one.name for one in found}) == len(found)
    there = {one.command[3] for one in found if one.command[1] == "benchmarks.gpu"}
    assert there == {part.name for part in PARTS}


def facts(*verdicts: str) -> list[Fact]:
    return [Fact(f"step{i}", "a", v, f"said {i}", i) for i, v in enumerate(verdicts)]  # type: ignore[arg-type]


def test_the_page_has_failures_first_and_its_verdict_in_the_title() -> None:
    text = page.page(
        facts("ok", "fails", "late", "skipped"), command="c", date="d", seconds=1, tables="| t |"
    )

    title = "# flashquant on a GPU: 1 well, 1 fail, 1 ended before their time, 1 not looked at"
    assert text.splitlines()[0] == title
    places = [text.index(f"said {i}") for i in (1, 2, 3, 0)]
    assert places == sorted(places)
    assert text.rstrip().endswith("| t |")


def test_a_step_with_a_failure_is_not_listed_as_well() -> None:
    found = [Fact("s", "a", "ok", "good", 1), Fact("s", "b", "fails", "bad", 2)]

    text = page.page(found, command="c", date="d", seconds=1, tables="")

    assert "bad" in text
    assert "good" not in text


def test_nothing_that_would_decide_for_the_programs_is_inherited(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setenv("FLASHRL_CONFIG", "int8")
    monkeypatch.setenv("PYTHONPATH", "/mine")

    env = environment.offline(Path("/project"), tmp_path / "site", tmp_path, on_cpu=False)

    assert "FLASHRL_CONFIG" not in env
    assert env["PYTHONPATH"].split(":")[:2] == ["/project", str(tmp_path / "site")]
    assert env["HF_HUB_OFFLINE"] == "1"


def test_what_somebody_has_set_is_left_as_it_is(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("VLLM_USE_DEEP_GEMM", "1")

    env = environment.offline(Path("/p"), Path("/s"), Path("/w"), on_cpu=False)

    assert env["VLLM_USE_DEEP_GEMM"] == "1"
