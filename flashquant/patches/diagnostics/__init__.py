"""Is this machine one on which flashquant keeps its promises, and how fast? Patches nothing.

doctor       versions, seams, kernels
examination  real engines, scheme by scheme
bench        a sync beside vLLM's own reload and the copy of its bytes
"""

from __future__ import annotations

from flashquant.patches.diagnostics.bench import (
    Result,
    Sync,
    Timing,
    measure,
    room_for_others,
    start,
    take_turns,
    timed,
    whole,
)
from flashquant.patches.diagnostics.doctor import Finding, examine

__all__ = [
    "Finding",
    "Result",
    "Sync",
    "Timing",
    "examine",
    "measure",
    "room_for_others",
    "start",
    "take_turns",
    "timed",
    "whole",
]
