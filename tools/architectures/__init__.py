"""Tiny random checkpoints of many architectures, as their own trainers write them.

transformers creates each model and saves it, so names and layouts are those of the Hub
(experts one by one, fused projections, transposed Conv1D). Every value is random, biases,
norms and router corrections included: in a fresh model they are zeros and ones, and a
reload that loses one would not be seen.

    python -m tools.architectures                   what there is
    python -m tools.architectures qwen3-moe OUT     policies a and b, in OUT/a and OUT/b

shapes      the numbers that all of them share
dense, moe, hybrid   one configuration an architecture; further: of several that came later
checkpoint  a configuration and a seed become a folder
"""

from tools.architectures.checkpoint import write
from tools.architectures.dense import DENSE
from tools.architectures.further import FURTHER
from tools.architectures.hybrid import HYBRID
from tools.architectures.moe import MOE

ARCHITECTURES = {**DENSE, **MOE, **HYBRID, **FURTHER}

__all__ = ["ARCHITECTURES", "DENSE", "FURTHER", "HYBRID", "MOE", "write"]
