"""What has to be decided before anything imports vLLM, in the one process of the tests.

Several engines live in it side by side, in process and eager: starting the first
takes ten seconds, each further one half a second.
"""

from __future__ import annotations

import os
import signal
import sys
from typing import Any

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
# Some tests interrupt themselves, which a run in the background would ignore.
signal.signal(signal.SIGINT, signal.default_int_handler)


def pytest_terminal_summary(terminalreporter: Any) -> None:
    """How much was thrown at the engines, and by which seed."""
    suite = sys.modules.get("tests.engine.faults")
    if suite is not None and suite.INJECTED:
        counts = ", ".join(f"{name} {count}" for name, count in suite.INJECTED.items())
        terminalreporter.write_line(
            f"faults injected: {sum(suite.INJECTED.values())} (seed {suite.SEED}): {counts}"
        )
