"""The Triton kernel in Triton's interpreter, beside the definition.

The interpreter has to be chosen before Triton is imported, hence a program. It writes the cases
whose sums differ, and what a GPU is asked before it is believed.
"""

from __future__ import annotations

import json
import os
import sys
from collections.abc import Iterator
from pathlib import Path

os.environ["TRITON_INTERPRET"] = "1"

import torch
from torch import Tensor

from flashquant.schemes.fingerprints import definition, fused


def cases() -> Iterator[tuple[str, Tensor]]:
    dice = torch.Generator().manual_seed(3)
    for size in (0, 1, 8, 4095, 4096, 4097, 16384, 3 * 16384 + 5, 65536, 5 * 65536 + 24):
        yield f"{size} bytes", torch.empty(size, dtype=torch.uint8).random_(generator=dice)
    for dtype in (torch.bfloat16, torch.float32, torch.bool, torch.int64):
        yield str(dtype), (torch.randn(33, 47, generator=dice) * 9).to(dtype)
    yield "a window", torch.randn(4000, generator=dice).bfloat16()[3:]
    yield "all bits set", torch.full((5000,), -1, dtype=torch.int64)
    yield "one element, expanded", torch.full((), 2.0).expand(1)


def main() -> None:
    names, tensors = zip(*cases(), strict=True)
    alone = [fused.sums([tensor])[0].tolist() for tensor in tensors]
    defined = [definition.sums(tensor).tolist() for tensor in tensors]
    found = dict(zip(names, zip(alone, defined, strict=True), strict=True))
    # In one launch, in any order: small ones beside those of many programs.
    for kind, order in (("all", range(len(tensors))), ("backwards", range(len(tensors))[::-1])):
        made = fused.sums([tensors[place] for place in order]).tolist()
        found[kind] = [made, [defined[place] for place in order]]
    found["none"] = [fused.sums([tensors[0]] * 3).tolist(), [defined[0]] * 3]
    found["difference"] = [fused.difference(torch.device("cpu")), None]
    Path(sys.argv[1]).write_text(json.dumps(found))


if __name__ == "__main__":
    main()
