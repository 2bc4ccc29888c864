"""Write the two policies of one architecture: see the package."""

from __future__ import annotations

import argparse
from pathlib import Path

from rich.console import Console

from tools.architectures import ARCHITECTURES, write


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m tools.architectures", description=__doc__)
    parser.add_argument("name", nargs="?", choices=sorted(ARCHITECTURES))
    parser.add_argument("out", nargs="?", type=Path)
    chosen = parser.parse_args()
    if chosen.name is None or chosen.out is None:
        Console().print("\n".join(ARCHITECTURES))
        return
    for seed, policy in enumerate("ab"):
        write(chosen.name, seed, chosen.out / policy)


if __name__ == "__main__":
    main()
