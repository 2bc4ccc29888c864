"""Tests of the engine, on the GPU of this machine; each file in a process of its own.

python -m tools.gpu.suite tests/engine/test_on_gpu.py
"""

from __future__ import annotations

import sys
from collections import Counter

import pytest

from tools.gpu.telling import tell

# Another machine's pytest: warnings of its plugins and of its torch are not what is looked for.
_FLAGS = ["-p", "no:cacheprovider", "-p", "no:terminal", "-W", "default", "--timeout", "280"]
_OFTEN = 10  # tests between two facts of how far it is


class _Telling:
    """A fact a test that fails, at once; now and then, how many passed."""

    def __init__(self) -> None:
        self.counts: Counter[str] = Counter()

    def pytest_collectreport(self, report: pytest.CollectReport) -> None:
        self._judge(report)

    def pytest_runtest_logreport(self, report: pytest.TestReport) -> None:
        self._judge(report)
        if report.skipped or (report.when == "call" and report.passed):
            self.counts["skipped" if report.skipped else "passed"] += 1
            if self.counts.total() % _OFTEN == 0:
                tell("so far", self.told())

    def _judge(self, report: pytest.CollectReport | pytest.TestReport) -> None:
        if report.failed:
            self.counts["failed"] += 1
            sys.stderr.write(f"\n{report.nodeid}\n{report.longreprtext}\n")
            tell(report.nodeid, report.longreprtext.strip().splitlines()[-1][:600], "fails")

    def told(self) -> str:
        return ", ".join(f"{count} {what}" for what, count in sorted(self.counts.items()))


def main() -> int:
    """0 where no test failed."""
    telling = _Telling()
    code = pytest.main([*_FLAGS, *sys.argv[1:]], plugins=[telling])
    well = code == pytest.ExitCode.OK
    tell("tests", telling.told() or f"none ran: {code!r}", "ok" if well else "fails")
    return int(code)


if __name__ == "__main__":
    raise SystemExit(main())
