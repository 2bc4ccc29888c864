"""Where every element that a trainer sends must land: learned from the engine's own loader, once.

weights   whatever a caller hands over, as a stream of named tensors
wrappers  names with the marks of FSDP, PEFT and others, and without them
loader    what is asked of a serving model
trace     watch its loader take a tensor, and note what it does
writes    the nouns: View, Write, Fill, Replay, TensorPlan, WritePlan
planner   the plan of every name, made when it first comes by
"""

from __future__ import annotations

from flashquant.plan.loader import Loader
from flashquant.plan.planner import Planner
from flashquant.plan.trace import replay, storage_of, tensors_in, written_by
from flashquant.plan.weights import (
    CARRIED,
    NamedTensors,
    Offered,
    Weights,
    few_at_a_time,
    named_forms,
    named_tensors,
    naming_the_file,
    stored_names,
)
from flashquant.plan.wrappers import Names, unwrapped
from flashquant.plan.writes import Fill, Replay, Step, TensorPlan, View, Write, WritePlan

__all__ = [
    "CARRIED",
    "Fill",
    "Loader",
    "NamedTensors",
    "Names",
    "Offered",
    "Planner",
    "Replay",
    "Step",
    "TensorPlan",
    "View",
    "Weights",
    "Write",
    "WritePlan",
    "few_at_a_time",
    "named_forms",
    "named_tensors",
    "naming_the_file",
    "replay",
    "storage_of",
    "stored_names",
    "tensors_in",
    "unwrapped",
    "written_by",
]
