"""The process that cells run in, one after another; one that dies or is late costs its cell.

python -m tools.compatibility.workers judge FOLDER CONNECTION
"""

from __future__ import annotations

import signal
import subprocess
import sys
from collections.abc import Callable, Iterator, Sequence
from contextlib import closing
from multiprocessing import Pipe
from multiprocessing.connection import Connection
from pathlib import Path
from typing import ClassVar
from unittest import mock

import tests.conftest  # noqa: F401  (the environment in which engines share a process)
from tools.compatibility.cell import DIED, ENGINE, Cell

Asked = tuple[str, str]  # architecture, scheme
Look = Callable[[str, str, Path], Cell]

# Engines stay in memory until their process ends.
_CELLS_A_PROCESS = 40
# A cell takes 10 seconds at most, the first one of a process 20 more.
_SECONDS_A_CELL = 200


class Worker:
    """A conversation with one process, which is started anew when it has ended."""

    PROGRAM: ClassVar = (sys.executable, "-m", __spec__.name)

    def __init__(self, verb: str, folder: Path, seconds: float = _SECONDS_A_CELL) -> None:
        """Start nothing yet.

        Args:
            verb: `judge` or `blame`.
            folder: for checkpoints, which all processes share, and for the log.
            seconds: what a cell may take.

        """
        self._verb, self._folder, self.seconds = verb, folder, seconds
        self._log = folder / "log.txt"
        self._running: tuple[subprocess.Popen[bytes], Connection] | None = None
        self._looked_at = 0

    def look(self, asked: Asked) -> Cell:
        """One cell, in the process that runs or in a new one.

        Raises:
            RuntimeError: the process ended by itself, which is no cell's fault.

        """
        if self._looked_at == _CELLS_A_PROCESS:
            self.close()
        process, connection = self._running = self._running or self._start()
        self._looked_at += 1
        answered = False
        try:
            connection.send(asked)
            if not connection.poll(self.seconds):
                return self._unserved(asked, f"no answer in {self.seconds} seconds")
            cell: Cell = connection.recv()
            answered = True
            return cell
        except (EOFError, ConnectionError):
            return self._unserved(asked, _last_words(process.wait(), self._log.read_text(), asked))
        finally:
            if not answered:  # whatever comes later would be taken for the next cell's
                self.close()

    def close(self) -> None:
        """End the process, with its engines."""
        if self._running is not None:
            process, connection = self._running
            connection.close()
            process.kill()
            process.wait()
        self._running, self._looked_at = None, 0

    def _start(self) -> tuple[subprocess.Popen[bytes], Connection]:
        ours, theirs = Pipe()
        with self._log.open("w") as said, closing(theirs):
            process = subprocess.Popen(
                [*self.PROGRAM, self._verb, str(self._folder), str(theirs.fileno())],
                stdout=said,
                stderr=subprocess.STDOUT,
                pass_fds=(theirs.fileno(),),
            )
        return process, ours

    def _unserved(self, asked: Asked, why: str) -> Cell:
        return Cell(*asked, ENGINE if self._verb == "blame" else DIED, why)


def run(verb: str, cells: Sequence[Asked], folder: Path) -> Iterator[Cell]:
    """Let `judge` or `blame` look at cells, in as few processes as possible."""
    with closing(Worker(verb, folder)) as worker:
        for asked in cells:
            yield worker.look(asked)


def _last_words(code: int, log: str, asked: Asked) -> str:
    """The signal, and the failed check that the kernel named, if it did."""
    if code >= 0:
        raise RuntimeError(f"a worker failed at {'-'.join(asked)}: {log[-2000:]}")
    said = [line.strip() for line in log.splitlines() if "CHECK" in line or "Error:" in line]
    return f"{signal.Signals(-code).name}: {said[-1] if said else 'nothing was said'}"


def answer(look: Look, folder: Path, connection: Connection) -> None:
    """Look at what is asked for, until nobody asks any more."""
    while True:
        try:
            asked: Asked = connection.recv()
        except EOFError:
            return
        connection.send(look(*asked, folder))


def main(arguments: Sequence[str]) -> None:
    """Be that process."""
    from vllm.model_executor.models import registry

    from tools.compatibility.control import blame
    from tools.compatibility.trial import judge

    verb, folder, connection = arguments
    # vLLM asks each class of models what it can in a process of its own, for CUDA's sake: ten
    # seconds each. Here is none.
    with mock.patch.object(registry, "_run_in_subprocess", lambda ask: ask()):
        look = {"judge": judge, "blame": blame}[verb]
        answer(look, Path(folder), Connection(int(connection)))


if __name__ == "__main__":
    main(sys.argv[1:])
