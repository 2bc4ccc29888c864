"""What comes out of one cell."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

SCHEMES = (
    *("bf16", "int8", "fp8_vllm", "fp8_channel", "fp8_tensor", "fp8_block", "int4"),
    *("mxfp8", "nvfp4"),
)

# The same over two ranks: each has a part of every tensor, or all of every second expert.
RANKED = ("bf16 TP=2", "int8 TP=2", "bf16 EP=2", "int8 EP=2")
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
    return {
        "tensor_parallel_size": 2,
        "enable_expert_parallel": column.endswith("EP=2"),
        "distributed_executor_backend": "external_launcher",
        "seed": 0,
    }


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
