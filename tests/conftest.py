"""What has to be decided before anything imports vLLM, in a process of tests.

Several engines live in it side by side, in process and eager: starting the first
takes ten seconds, each further one half a second. `make test` has two such processes, and
gives each of them whole files.
"""

from __future__ import annotations

import os
import signal
import sys
from collections import Counter
from typing import Any

import pytest
from hypothesis import settings

from tests.support import fp8, isa, room, vision

isa.pretend()  # before torch is imported
os.environ.pop("FLASHRL_CONFIG", None)
os.environ.pop("VLLM_CPU_KVCACHE_SPACE", None)  # would override kv_cache_memory_bytes
os.environ.update(
    HF_HUB_OFFLINE="1",
    OMP_NUM_THREADS="1",  # tiny layers: a second thread costs more than it brings
    OMP_WAIT_POLICY="passive",  # or idle threads spin on the cores the others need
    TORCHDYNAMO_DISABLE="1",
    VLLM_CPU_OMP_THREADS_BIND="nobind",
    VLLM_ENABLE_V1_MULTIPROCESSING="0",
    VLLM_LOGGING_LEVEL="ERROR",
)
vision.make_ready()  # imports torch, which counts its threads then; before transformers
fp8.multiply_as_everywhere()
# Some tests interrupt themselves, which a run in the background would ignore.
signal.signal(signal.SIGINT, signal.default_int_handler)
settings.register_profile("long", max_examples=1000)  # --hypothesis-profile long


_injected: Counter[str] = Counter()  # faults, by the engine they were thrown at
_seeds: set[int] = set()


def pytest_sessionstart(session: Any) -> None:
    """A full disk breaks tests in ways that look like something else; xdist's workers ask not."""
    config = session.config
    if hasattr(config, "workerinput") or config.option.collectonly:
        return
    whole = config.args_source is not pytest.Config.ArgsSource.ARGS
    if said := room.lacking(whole=whole):
        pytest.exit(f"no room for the tests: {said}", returncode=4)


def pytest_sessionfinish(session: Any) -> None:
    """How much was thrown at the engines of this process, and by which seed."""
    suite = sys.modules.get("tests.engine.faults")
    if suite is None:
        return
    if (told := getattr(session.config, "workeroutput", None)) is not None:
        told["injected"], told["seed"] = dict(suite.INJECTED), suite.SEED
    else:
        _injected.update(suite.INJECTED)
        _seeds.add(suite.SEED)


@pytest.hookimpl(optionalhook=True)
def pytest_testnodedown(node: Any) -> None:
    """The same, of a process that pytest-xdist has started."""
    told = getattr(node, "workeroutput", {})
    _injected.update(told.get("injected", {}))
    _seeds.update({told["seed"]} if "seed" in told else ())


def pytest_terminal_summary(terminalreporter: Any) -> None:
    """Everybody's, in one line."""
    if _injected:
        counts = ", ".join(f"{name} {count}" for name, count in _injected.items())
        terminalreporter.write_line(
            f"faults injected: {_injected.total()} (seed {min(_seeds)}): {counts}"
        )
