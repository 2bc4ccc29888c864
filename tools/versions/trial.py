"""What one version of vLLM does with flashquant: its seams looked at, the engine tests run."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from xml.etree import ElementTree

ROOT = Path(__file__).parents[2]

# How `tests.engine.serving.needs` begins the reason of what it skips.
LACKS = "this vLLM has no "


@dataclass(frozen=True)
class Outcome:
    """How the tests went.

    Attributes:
        skipped: the reasons, and how often each was given.
        failed: the names.

    """

    passed: int
    skipped: Mapping[str, int]
    failed: tuple[str, ...]

    @property
    def lacks(self) -> tuple[str, ...]:
        """What this vLLM does not have, so that its tests were skipped."""
        found = (reason.removeprefix(LACKS) for reason in self.skipped if reason.startswith(LACKS))
        return tuple(sorted(found))


@dataclass(frozen=True)
class Seams:
    """How many of flashquant's points fit, and what is wrong with the others."""

    fit: int
    misfits: tuple[str, ...]

    @property
    def total(self) -> int:
        return self.fit + len(self.misfits)


def look_at_seams(path: Sequence[Path]) -> Seams:
    """Ask `flashquant doctor`, in a process that imports this vLLM."""
    answer = _python(path, "-c", _DOCTOR)
    # vLLM logs to the same stream before the answer.
    _, _, found = answer.stdout.rpartition(_MARK)
    if not found:
        return Seams(0, (answer.stderr.strip().splitlines()[-1],))
    seams = [finding for finding in json.loads(found) if finding["topic"] == "seams"]
    misfits = tuple(seam["detail"] for seam in seams if seam["verdict"] != "ok")
    return Seams(len(seams) - len(misfits), misfits)


def run_tests(path: Sequence[Path], tests: Sequence[str], pattern: str | None) -> Outcome:
    """Run pytest in a process that imports this vLLM; what it says is kept in a log."""
    report, log = path[0] / "junit.xml", path[0] / "pytest.log"
    report.unlink(missing_ok=True)
    chosen = ["-k", pattern] if pattern else []
    arguments = ["-q", "--tb=short", "-p", "no:cacheprovider", f"--junitxml={report}", *chosen]
    answer = _python(path, "-m", "pytest", *arguments, *tests)
    log.write_text(answer.stdout + answer.stderr)
    if not report.exists():
        raise RuntimeError(f"pytest came to no result; {log} says why")
    return outcome_of(report.read_text())


def outcome_of(junit: str) -> Outcome:
    """Count what a report of pytest says."""
    passed, skipped, failed = 0, dict[str, int](), list[str]()
    for case in ElementTree.fromstring(junit).iter("testcase"):
        if (skip := case.find("skipped")) is not None:
            reason = skip.get("message", "")
            skipped[reason] = skipped.get(reason, 0) + 1
        elif case.find("failure") is not None or case.find("error") is not None:
            failed.append(f"{case.get('classname')}::{case.get('name')}")
        else:
            passed += 1
    return Outcome(passed, skipped, tuple(dict.fromkeys(failed)))


def _python(path: Sequence[Path], *arguments: str) -> subprocess.CompletedProcess[Any]:
    import_path = os.pathsep.join(map(str, (ROOT, *path)))
    return subprocess.run(
        [sys.executable, *arguments],
        cwd=ROOT,
        env={**os.environ, "PYTHONPATH": import_path, "VLLM_LOGGING_LEVEL": "ERROR"},
        capture_output=True,
        text=True,
        check=False,
    )


_MARK = "--- findings ---"
_DOCTOR = f"""
import sys
from flashquant.cli.main import main
from vllm import version  # whatever vLLM has to say, it says now
sys.stdout.write({_MARK!r})
main(["doctor", "--json"])
"""
