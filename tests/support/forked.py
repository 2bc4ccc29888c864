"""Processes that find vLLM imported: forked from one that has done nothing else.

    process of tests ──▶ fork server ◀── a program, for what it spawns: engine cores, workers
                              └──▶ the program, engine cores, workers

To import vLLM takes eight CPU seconds, and an engine over two ranks is four processes. What vLLM
spawns stays as it is but for that: it inherits nothing from the process that asks for it, and
reads what to do from a pipe. The examples, and Ray's actors, start as they do for users.
"""

from __future__ import annotations

import atexit
import ctypes
import multiprocessing
import os
import runpy
import sys
import time
from collections.abc import Mapping, Sequence
from multiprocessing import connection, forkserver, spawn
from multiprocessing.context import ForkServerContext, ForkServerProcess
from multiprocessing.process import BaseProcess
from pathlib import Path
from typing import Any

from tests.support import fp8, inspection, vision
from tests.support.gpu import HAS_GPU

# The fork server imports this first, and transformers looks for torchvision only once.
vision.make_ready()

# What engine cores and workers import; flashquant is not among it: plugins bring it.
_IMPORTED = ["vllm.entrypoints.llm", "vllm.v1.engine.async_llm", "vllm.v1.worker.cpu_worker"]
# Looked at by torch and Triton while they are imported.
_TOO_LATE = ("OMP_NUM_THREADS", "TORCHDYNAMO_DISABLE", "TRITON_INTERPRET")


class _Process(ForkServerProcess):
    def _bootstrap(self, parent_sentinel: int | None = None) -> int:
        """End as an interpreter does: what vLLM holds in C++ unlinks its shared memory then."""
        code = super()._bootstrap(parent_sentinel)
        ctypes.pythonapi.Py_Exit(code)
        return code


class _Context(ForkServerContext):
    Process = _Process


_context = _Context()


def can_have(environ: Mapping[str, str]) -> bool:
    """Whether a process with this environment would have imported the same."""
    return all(environ.get(name) == os.environ.get(name) for name in _TOO_LATE)


def start(
    module: str, arguments: Sequence[object], environ: Mapping[str, str], output: Path
) -> BaseProcess:
    """`python -m module arguments`, which writes what it says into a file."""
    # CUDA bears no fork, so nothing that may touch it is imported before one.
    _context.set_forkserver_preload([] if HAS_GPU else [__name__, *_IMPORTED])
    output.touch()
    words = list(map(str, arguments))
    process = _context.Process(
        name="MainProcess",  # as vLLM's logs call it
        target=_run,
        args=(module, words, dict(environ), os.getcwd(), str(output)),
    )
    process.start()
    return process


def end(processes: Sequence[BaseProcess], timeout: float) -> list[int | None]:
    """Wait until all have ended, or one of them badly; nothing of them is left.

    Returns:
        The exit code of each; None of one that did not end in time, or before another failed.

    """
    until = time.monotonic() + timeout
    try:
        while running := [process.sentinel for process in processes if process.exitcode is None]:
            left = until - time.monotonic()
            if left < 0 or any(process.exitcode for process in processes):
                break
            connection.wait(running, left)
        return [process.exitcode for process in processes]
    finally:
        for process in processes:
            process.kill()


def _run(
    module: str, arguments: list[str], environ: dict[str, str], folder: str, output: str
) -> None:
    os.chdir(folder)
    _become(environ, output)
    sys.argv[1:] = arguments
    try:
        runpy.run_module(module, run_name="__main__", alter_sys=True)
    finally:
        atexit._run_exitfuncs()  # before `multiprocessing` waits for what was spawned here


def _become(environ: dict[str, str], output: str) -> None:
    """Take over another process's environment and output; what is spawned here does likewise."""
    os.environ.clear()
    os.environ.update(environ)
    file = os.open(output, os.O_WRONLY | os.O_CREAT | os.O_APPEND)
    os.dup2(file, 1)
    os.dup2(file, 2)
    os.close(file)

    inspection.inspect_models_here()
    if not HAS_GPU:
        fp8.multiply_as_everywhere()
    describe = spawn.get_preparation_data

    def with_environment(name: str) -> dict[str, Any]:
        return {"takes over": _Environment(output), **describe(name)}

    spawn.get_preparation_data = with_environment
    forkserver._forkserver.ensure_running = lambda: None  # the one that has forked this process
    multiprocessing.get_context = lambda method=None: (
        _context if method == "spawn" else _get_context(method)
    )


_get_context = multiprocessing.get_context


class _Environment:
    """Unpickled first of all, it makes a process take over what the one that sends it has."""

    def __init__(self, output: str) -> None:
        self._output = output

    def __reduce__(self) -> tuple[Any, ...]:
        return _become, (dict(os.environ), self._output)
