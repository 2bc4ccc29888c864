"""What comes out of one cell."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

SCHEMES = (
    *("bf16", "int8", "fp8_vllm", "fp8_channel", "fp8_tensor", "fp8_block", "int4"),
    *("mxfp8", "nvfp4"),
)

# The same over two ranks: each has a part of every tensor, all of every second expert, or half of
# the layers.
_TENSORS = {"tensor_parallel_size": 2}
_OVER: dict[str, dict[str, Any]] = {
    "TP=2": _TENSORS,
    "EP=2": {**_TENSORS, "enable_expert_parallel": True},
    "PP=2": {"pipeline_parallel_size": 2},
}
RANKED = tuple(f"{scheme} {over}" for over in _OVER for scheme in ("bf16", "int8"))
COLUMNS = (*SCHEMES, *RANKED)

EXACT, ENGINE, REFUSED, WRONG = "exact", "engine", "refused", "WRONG"
NO_EXPERTS = "no experts"
DIED = "died"  # until `control` has told whose fault it is


def scheme_of(column: str) -> str:
    """The scheme of a column."""
    return column.partition(" ")[0]


def options_of(column: str) -> dict[str, Any]:
    """The options of its engines that say over how many ranks they run, if over several."""
    if column not in RANKED:
        return {}
    over = column.partition(" ")[2]
    return {**_OVER[over], "distributed_executor_backend": "external_launcher", "seed": 0}


@dataclass(frozen=True)
class Cell:
    """What came out, and the reason where it is not `exact`.

    Attributes:
        scheme: the column: a scheme, or a scheme over ranks.

    """

    architecture: str
    scheme: str
    verdict: str
    why: str = ""
