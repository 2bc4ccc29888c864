"""Commands that use vLLM serve in their own process, and say no more than they have to."""

from __future__ import annotations

import os
from typing import Final

_SETTINGS: Final = {
    "TORCHDYNAMO_DISABLE": "1",
    "VLLM_ENABLE_V1_MULTIPROCESSING": "0",
    "VLLM_LOGGING_LEVEL": "ERROR",
    "FLASHRL_LOGGING_LEVEL": "ERROR",
}


def serve_here() -> None:
    """Before vLLM is imported: engines in this process, quiet; what the user has set stays."""
    for name, value in _SETTINGS.items():
        os.environ.setdefault(name, value)
