"""What comes out of one cell."""

from __future__ import annotations

from dataclasses import dataclass

SCHEMES = ("bf16", "int8", "fp8_vllm", "fp8_channel", "fp8_tensor", "fp8_block", "int4")

EXACT, ENGINE, REFUSED, WRONG = "exact", "engine", "refused", "WRONG"
DIED = "died"  # until `control` has told whose fault it is


@dataclass(frozen=True)
class Cell:
    """What came out, and the reason where it is not `exact`."""

    architecture: str
    scheme: str
    verdict: str
    why: str = ""
