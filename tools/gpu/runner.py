"""Steps, one after another or a few at a time; each fact is passed on as soon as it is known."""

from __future__ import annotations

import contextlib
import json
import os
import signal
import subprocess
import threading
import time
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

from tools.gpu.page import Fact, Verdict
from tools.gpu.steps import WAYS, Step, Way, interpreted

_LEAST = 20.0  # seconds; with less left, a step is not begun
_LOOKS = 0.2  # seconds between two looks at what a program says
_VERDICTS: dict[str, Verdict] = {"ok": "ok", "fails": "fails", "skipped": "skipped"}
_IN_BULK = {"seams", "schemes"}  # topics of which only what fails is told
_KEYS = {"name", "verdict", "detail"}


class Runner:
    """All steps of one call.

    Attributes:
        facts: in the order in which they were found.

    """

    def __init__(
        self,
        env: Mapping[str, str],
        logs: Path,
        *,
        budget: float,
        jobs: int,
        tell: Callable[[Fact], None],
    ) -> None:
        """Args:
        env: of every program.
        logs: a folder for what they print.
        budget: seconds for everything.
        jobs: programs at a time, where none of them measures.
        tell: called with each fact, from several threads.

        """
        self._env, self._logs, self._jobs = env, logs, jobs
        self._tell, self._lock = tell, threading.Lock()
        self._began = time.monotonic()
        self._until = self._began + budget
        self._way = Way()
        self.facts: list[Fact] = []

    @property
    def seconds(self) -> float:
        """Since the beginning."""
        return time.monotonic() - self._began

    def run(self, steps: Sequence[Step]) -> None:
        """In order; neighbours that do not measure, a few at a time."""
        for together in in_groups(steps):
            with ThreadPoolExecutor(self._jobs) as pool:
                list(pool.map(self._step, together))

    def _step(self, step: Step) -> None:
        ways = WAYS if step.tries_ways else (self._way,)
        for way in ways:
            left = self._until - time.monotonic()
            if left < _LEAST:
                self._note(step, "program", "skipped", "not begun, for want of time")
                return
            serves = self._program(step, way, min(step.seconds, left))
            if serves or not step.tries_ways:
                break
        else:
            return
        if step.tries_ways and way != WAYS[0]:
            self._way = way
            self._note(step, "settings", "ok", f"from here on: {way}")

    def _program(self, step: Step, way: Way, seconds: float) -> bool:
        """Whether it ended well, and vLLM served what it was to serve."""
        name = step.name if way == self._way else f"{step.name}-{WAYS.index(way)}"
        output, log = self._logs / f"{name}.out", self._logs / f"{name}.log"
        env = {**self._env, **way.env, **step.env}
        if step.shares:  # each would start a thread a core: their engines then take minutes
            env.setdefault("OMP_NUM_THREADS", str(max(1, (os.cpu_count() or 1) // self._jobs)))
        with output.open("w") as said, log.open("w") as logged:
            process = subprocess.Popen(
                interpreted(step, way), stdout=said, stderr=logged, env=env, start_new_session=True
            )
        until, read, is_late = time.monotonic() + seconds, 0, False
        found: list[Fact] = []
        try:
            while process.poll() is None and not is_late:
                time.sleep(_LOOKS)
                is_late = time.monotonic() > until
                read += self._pass_on(step, output, read, found)
        finally:
            _end(process)
        self._pass_on(step, output, read, found)
        self._judge(step, process.returncode, log, found, seconds if is_late else None)
        return not is_late and all(fact.verdict == "ok" for fact in found) and bool(found)

    def _judge(
        self, step: Step, code: int, log: Path, found: list[Fact], late_after: float | None
    ) -> None:
        """A program that ended otherwise than it should is a fact of its own."""
        if late_after is not None:
            detail = f"ended after {late_after:.0f} s; the last it said: {last_words(log)}"
            self._note(step, "program", "late", detail)
        elif code and not any(fact.verdict == "fails" for fact in found):
            self._note(step, "program", "fails", f"exit code {code}: {last_words(log)}")
        elif not found:
            self._note(step, "program", "fails", f"it told nothing: {last_words(log)}")

    def _pass_on(self, step: Step, output: Path, already: int, found: list[Fact]) -> int:
        """Facts among the complete lines of a program; how many lines were new."""
        lines = output.read_text(errors="replace").splitlines(keepends=True)[already:]
        complete = [line for line in lines if line.endswith("\n")]
        for line in complete:
            if (fact := told(line)) is not None:
                kind = _VERDICTS.get(fact["verdict"], "fails")
                if kind == "skipped" and fact.get("topic") in _IN_BULK:
                    continue
                found.append(
                    self._note(step, fact["name"], kind, fact["detail"], fact.get("topic"))
                )
        return len(complete)

    def _note(
        self, step: Step, name: str, verdict: Verdict, detail: str, topic: str | None = None
    ) -> Fact:
        fact = Fact(step.name, name, verdict, " ".join(detail.split()), round(self.seconds, 1))
        with self._lock:
            self.facts.append(fact)
            if verdict == "fails" or topic not in _IN_BULK:
                self._tell(fact)
        return fact


def in_groups(steps: Sequence[Step]) -> list[list[Step]]:
    """Neighbours that may run at the same time, in order."""
    groups: list[list[Step]] = []
    for step in steps:
        last = groups[-1][-1] if groups else None
        if last and step.shares and last.shares:
            groups[-1].append(step)
        else:
            groups.append([step])
    return groups


def told(line: str) -> dict[str, Any] | None:
    """The fact that a line of a program's output is, if it is one."""
    with contextlib.suppress(json.JSONDecodeError):
        fact = json.loads(line)
        if isinstance(fact, dict) and fact.keys() >= _KEYS:
            return fact
    return None


def last_words(log: Path) -> str:
    """What an exception says; of a program that raised none, its last line."""
    lines = [line.strip() for line in log.read_text(errors="replace").splitlines() if line.strip()]
    raised = [line for line in lines if line.split(":")[0].endswith(("Error", "Exception"))]
    return (raised or lines or ["nothing"])[-1][:600]


def _end(process: subprocess.Popen[bytes]) -> None:
    """With everything that it has started."""
    with contextlib.suppress(ProcessLookupError):
        os.killpg(process.pid, signal.SIGKILL)
    process.wait()
