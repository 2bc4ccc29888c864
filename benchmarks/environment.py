"""The environment of a benchmark that starts vLLM in its own process."""

from __future__ import annotations

import os

_ENVIRONMENT = {
    "HF_HUB_OFFLINE": "1",
    "TORCHDYNAMO_DISABLE": "1",
    "VLLM_ENABLE_V1_MULTIPROCESSING": "0",
}
_QUIET = {"VLLM_LOGGING_LEVEL": "ERROR", "FLASHRL_LOGGING_LEVEL": "ERROR"}
_UNSET = (
    "FLASHRL_CONFIG",
    "FLASHQUANT_LEDGER",
    "FLASHQUANT_DIGEST",
    "FLASHQUANT_UNDO",
    "VLLM_CPU_KVCACHE_SPACE",
)


def prepare() -> None:
    """Offline, eager, in process, quiet unless the user wants vLLM's log, and without leftovers."""
    for name in _UNSET:
        os.environ.pop(name, None)
    os.environ.update(_ENVIRONMENT)
    for name, value in _QUIET.items():
        os.environ.setdefault(name, value)
