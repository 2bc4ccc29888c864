"""Make the table of architectures and schemes: see the package."""

from __future__ import annotations

import argparse
import tempfile
import time
from collections.abc import Iterable, Sequence
from dataclasses import replace
from pathlib import Path

from rich.console import Console

import tests.conftest  # noqa: F401  (first: what transformers finds)
from tests.engine.sights import SIGHTS
from tools.architectures import ARCHITECTURES, FURTHER, MOE
from tools.compatibility import ranks, table, workers
from tools.compatibility.cell import (
    COLUMNS,
    DIED,
    ENGINE,
    NO_EXPERTS,
    RANKED,
    REFUSED,
    SCHEMES,
    WRONG,
    Cell,
)
from tools.compatibility.table import Part
from tools.compatibility.workers import Asked
from tools.versions.table import put_into

PAGE = Path(__file__).parents[2] / "docs" / "compatibility.md"

_IN_THE_PAGE = tuple(row for row in ARCHITECTURES if row not in FURTHER)
ALONE = Part("compatibility", _IN_THE_PAGE, SCHEMES)
SIGHTED = Part("images", tuple(SIGHTS), SCHEMES)
# A few that are dense: what differs over ranks is how experts are cut up.
PARALLEL = Part("ranks", ("llama", "qwen2-tied", "gemma3", *MOE), RANKED)
PARTS = (ALONE, SIGHTED, PARALLEL)
# Looked at where they are asked for, never written.
_BY_HAND = (
    Part("", tuple(FURTHER), SCHEMES),
    Part("", tuple(row for row in _IN_THE_PAGE if row not in PARALLEL.rows), RANKED),
)

_EXPERTS = ("num_experts", "num_local_experts", "n_routed_experts")

console = Console()


def main(arguments: Sequence[str] | None = None) -> int:
    """Run what was asked for; 0 when nothing is wrong."""
    parser = argparse.ArgumentParser(prog="python -m tools.compatibility", description=__doc__)
    known = [*ARCHITECTURES, *SIGHTS]
    parser.add_argument("--only", nargs="+", choices=known, metavar="ARCHITECTURE")
    parser.add_argument("--scheme", nargs="+", choices=COLUMNS, default=COLUMNS, metavar="COLUMN")
    parser.add_argument("--write", action="store_true", help="merge what comes out into the page")
    chosen = parser.parse_args(arguments)
    rows, columns = chosen.only or known, chosen.scheme
    parts = (*PARTS, *_BY_HAND) if chosen.only else PARTS
    asked = [(r, c) for p in parts for r in p.rows for c in p.columns if r in rows and c in columns]
    began = time.monotonic()
    with tempfile.TemporaryDirectory() as folder:
        found = _look(asked, Path(folder))
    cells = [found[one] for one in asked]
    console.print(table.markdown(cells), markup=False, soft_wrap=True)
    if chosen.write or not (chosen.only or chosen.scheme is not COLUMNS):
        write(cells)
    console.print(f"{len(cells)} cells in {(time.monotonic() - began) / 60:.1f} min")
    return 1 if any(cell.verdict == WRONG for cell in cells) else 0


def write(cells: Sequence[Cell], page: Path = PAGE) -> None:
    """Put cells into the tables of the page; what else they say stays."""
    for part in PARTS:
        mine = [c for c in cells if c.architecture in part.rows and c.scheme in part.columns]
        if mine:
            put_into(page, part.merged(page.read_text(), mine), part.begin, part.end)


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
        mine = [a for a in asked if has_experts(a[0]) == experts]
        yield from workers.run(verb, [a for a in mine if a[1] not in RANKED], folder)
        over = [a for a in mine if a[1] in RANKED]
        none = [a for a in over if not experts and a[1].endswith("EP=2")]
        yield from (Cell(*one, NO_EXPERTS) for one in none)
        for stages in (False, True):  # vLLM makes a process's groups once, too
            pair = [a for a in over if a[1].endswith("PP=2") == stages and a not in none]
            yield from ranks.run(verb, pair, folder)


def has_experts(architecture: str) -> bool:
    """Whether vLLM takes it for a mixture of experts."""
    config = (ARCHITECTURES | {name: sight.config for name, sight in SIGHTS.items()})[
        architecture
    ]()
    return any(hasattr(config, name) for name in _EXPERTS)


def _by_asked(cells: Iterable[Cell]) -> dict[Asked, Cell]:
    return {(cell.architecture, cell.scheme): cell for cell in cells}


def _say(cell: Cell) -> Cell:
    why = f": {cell.why}" if cell.why else ""
    console.print(f"{cell.architecture} {cell.scheme}: {cell.verdict}{why}"[:300], markup=False)
    return cell


if __name__ == "__main__":
    raise SystemExit(main())
