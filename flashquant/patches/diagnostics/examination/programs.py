"""A program with a time limit, whose answers are read while it runs."""

from __future__ import annotations

import contextlib
import json
import os
import re
import signal
import subprocess
import time
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

_RANK = re.compile(r"^\[rank\d+\]:")  # before each line of a worker
_EXCEPTION = re.compile(r"[\w.]+(Error|Exception|Interrupt|Exit|Engine): ")
_WORDS = 600  # shown of what a program said last
NO_END = "no end"
_LOOKS = 0.2  # seconds between two looks at its answers


class Program:
    """One program; ended with every process that it has started, when its time is over.

    Attributes:
        ended: how it ended, once its answers have been read; nothing, if well and in time.

    """

    def __init__(
        self, command: Sequence[str], *, env: Mapping[str, str], log: Path, seconds: float
    ) -> None:
        """Args:
        command: the program and its arguments.
        env: its whole environment.
        log: what it prints goes there.
        seconds: of its time.

        """
        self._command, self._env, self._log, self._seconds = command, env, log, seconds
        self.ended = ""

    def answers(self, file: Path) -> Iterator[dict[str, Any]]:
        """Run it, and yield each line of JSON that it writes to a file, as it comes."""
        file.unlink(missing_ok=True)
        with self._log.open("w") as output:
            process = subprocess.Popen(
                self._command,
                stdout=output,
                stderr=subprocess.STDOUT,
                env=self._env,
                start_new_session=True,
            )
        until, read, is_late = time.monotonic() + self._seconds, 0, False
        try:
            while process.poll() is None and not is_late:
                time.sleep(_LOOKS)
                is_late = time.monotonic() > until
                lines = _lines(file)
                yield from lines[read:]
                read = len(lines)
        finally:
            _end(process)
        yield from _lines(file)[read:]
        if is_late:
            self.ended = f"{NO_END} after {self._seconds:.0f} seconds"
        elif process.returncode:
            self.ended = f"exit code {process.returncode}"


def _lines(file: Path) -> list[dict[str, Any]]:
    """Those that are complete."""
    text = file.read_text() if file.exists() else ""
    return [json.loads(line) for line in text.splitlines(keepends=True) if line.endswith("\n")]


def _end(process: subprocess.Popen[bytes]) -> None:
    """What it has started is in its group, and may outlive it: compilers, workers."""
    with contextlib.suppress(ProcessLookupError):
        os.killpg(process.pid, signal.SIGKILL)
    process.wait()


def last_words(log: Path) -> str:
    """What the last exception says; of a program that raised none, its last line."""
    written = log.read_text(errors="replace").splitlines()
    lines = [said for line in written if (said := _RANK.sub("", line).strip())]
    raised = [index for index, line in enumerate(lines) if _EXCEPTION.match(line)]
    last = lines[raised[-1] :] if raised else lines[-1:]
    return " ".join(last)[:_WORDS] or "it said nothing"
