"""Is this machine one on which flashquant keeps its promises, and how fast? Patches nothing.

doctor       versions, seams, kernels
examination  real engines, scheme by scheme
bench        a sync beside vLLM's own reload and the copy of its bytes
inspection   where each tensor of a checkpoint would land, without its weights
lines        the same in as few lines as tell it; picture, drawn
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
from flashquant.patches.diagnostics.inspected import (
    Destination,
    Form,
    InspectedLayer,
    InspectedTensor,
    Inspection,
)
from flashquant.patches.diagnostics.inspection import inspect_model
from flashquant.patches.diagnostics.lines import Line, lines_of, names_together

__all__ = [
    "Destination",
    "Finding",
    "Form",
    "InspectedLayer",
    "InspectedTensor",
    "Inspection",
    "Line",
    "Result",
    "Sync",
    "Timing",
    "examine",
    "inspect_model",
    "lines_of",
    "measure",
    "names_together",
    "room_for_others",
    "start",
    "take_turns",
    "timed",
    "whole",
]
