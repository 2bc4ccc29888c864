"""Which process is which worker, and whether it still lives."""

from __future__ import annotations

import os
import socket
from pathlib import Path
from typing import NamedTuple

import psutil


class Member(NamedTuple):
    """One worker's process, as any process on its host can find it."""

    rank: int
    host: str  # with its namespace of process ids: containers may share a name
    pid: int
    started: float  # seconds since the epoch; process ids are used again

    @classmethod
    def here(cls, rank: int) -> Member:
        """This process."""
        return cls(rank, _host(), os.getpid(), psutil.Process().create_time())

    @property
    def gone(self) -> bool:
        """Whether the process has ended; one on another host cannot be seen, so it has not."""
        if self.host != _host():
            return False
        try:
            process = psutil.Process(self.pid)
            return process.status() == psutil.STATUS_ZOMBIE or process.create_time() != self.started
        except psutil.NoSuchProcess:
            return True


def _host() -> str:
    namespace = Path("/proc/self/ns/pid")
    own = os.readlink(namespace) if namespace.is_symlink() else ""
    return f"{socket.gethostname()} {own}".strip()
