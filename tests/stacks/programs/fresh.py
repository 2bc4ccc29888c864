"""Fresh engines on two policies, with the vLLM of the stack that is tested.

Usage: python -m tests.stacks.programs.fresh A B
"""

from __future__ import annotations

import sys
from typing import Any

from tests.stacks.programs.rollouts import print_result, said, start


def main(*checkpoints: str) -> dict[str, Any]:
    # One after the other: each has a process of its own.
    return {name: said(start(path)) for name, path in zip("ab", checkpoints, strict=True)}


if __name__ == "__main__":
    print_result(main(*sys.argv[1:]))
