"""Make the table of architectures and schemes: see the package."""

from __future__ import annotations

import argparse
import tempfile
import time
from collections.abc import Iterable, Sequence
from dataclasses import replace
from pathlib import Path

from rich.console import Console

from tools.architectures import ARCHITECTURES
from tools.compatibility import table, workers
from tools.compatibility.cell import DIED, ENGINE, REFUSED, SCHEMES, WRONG, Cell
from tools.compatibility.workers import Asked
from tools.versions.table import put_into

PAGE = Path(__file__).parents[2] / "docs" / "compatibility.md"

_EXPERTS = ("num_experts", "num_local_experts", "n_routed_experts")

console = Console()


def main(arguments: Sequence[str] | None = None) -> int:
    """Run what was asked for; 0 when nothing is wrong."""
    parser = argparse.ArgumentParser(prog="python -m tools.compatibility", description=__doc__)
    parser.add_argument("--only", nargs="+", choices=list(ARCHITECTURES), metavar="ARCHITECTURE")
    parser.add_argument("--scheme", nargs="+", choices=SCHEMES, default=SCHEMES)
    chosen = parser.parse_args(arguments)
    asked = [(name, scheme) for name in chosen.only or ARCHITECTURES for scheme in chosen.scheme]
    began = time.monotonic()
    with tempfile.TemporaryDirectory() as folder:
        found = _look(asked, Path(folder))
    cells = [found[one] for one in asked]
    console.print(table.markdown(cells), markup=False, soft_wrap=True)
    console.print(f"{len(cells)} cells in {(time.monotonic() - began) / 60:.1f} min")
    if len(cells) == len(ARCHITECTURES) * len(SCHEMES):
        put_into(PAGE, table.markdown(cells), table.BEGIN, table.END)
        console.print(f"the table in {PAGE} is written")
    return 1 if any(cell.verdict == WRONG for cell in cells) else 0


def _look(asked: Sequence[Asked], folder: Path) -> dict[Asked, Cell]:
    """Every cell; what is not served is tried once more without flashquant."""
    found = _by_asked(_say(cell) for cell in _run("judge", asked, folder))
    unserved = [one for one, cell in found.items() if cell.verdict in (DIED, REFUSED)]
    for one, alone in _by_asked(_run("blame", unserved, folder)).items():
        found[one] = _say(_verdict(found[one], alone))
    return found


def _verdict(cell: Cell, alone: Cell) -> Cell:
    """Of a cell that is not served, by what vLLM alone does."""
    if alone.verdict == ENGINE:
        if cell.verdict == DIED:
            return alone
        layer = cell.why.partition(":")[0]
        return replace(alone, why=f"{alone.why}; flashquant refuses {layer} before it loads")
    if cell.verdict == REFUSED:
        return cell
    return replace(alone, why=f"{cell.why} ({alone.why})")


def _run(verb: str, asked: Sequence[Asked], folder: Path) -> Iterable[Cell]:
    """Experts apart: vLLM has an expert-parallel group where the first engine has experts."""
    for experts in (False, True):
        yield from workers.run(verb, [a for a in asked if has_experts(a[0]) == experts], folder)


def has_experts(architecture: str) -> bool:
    """Whether vLLM takes it for a mixture of experts."""
    config = ARCHITECTURES[architecture]()
    return any(hasattr(config, name) for name in _EXPERTS)


def _by_asked(cells: Iterable[Cell]) -> dict[Asked, Cell]:
    return {(cell.architecture, cell.scheme): cell for cell in cells}


def _say(cell: Cell) -> Cell:
    why = f": {cell.why}" if cell.why else ""
    console.print(f"{cell.architecture} {cell.scheme}: {cell.verdict}{why}"[:300], markup=False)
    return cell


if __name__ == "__main__":
    raise SystemExit(main())
