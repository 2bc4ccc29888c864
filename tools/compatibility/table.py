"""Verdicts as a markdown table; each reason once, as a numbered line below it."""

from __future__ import annotations

import re
from collections.abc import Sequence

from tools.compatibility.cell import EXACT, SCHEMES, Cell

BEGIN, END = "<!-- compatibility: begin -->", "<!-- compatibility: end -->"

_LONGEST = 420


def markdown(cells: Sequence[Cell]) -> str:
    """One row an architecture, one column a scheme."""
    reasons: dict[str, int] = {}
    rows: dict[str, dict[str, str]] = {}
    for cell in cells:
        shown = cell.verdict
        if cell.verdict != EXACT:
            shown += f" ({reasons.setdefault(_short(cell.why), len(reasons) + 1)})"
        rows.setdefault(cell.architecture, {})[cell.scheme] = shown
    schemes = [scheme for scheme in SCHEMES if any(scheme in row for row in rows.values())]
    lines = [
        f"| architecture | {' | '.join(schemes)} |",
        f"|---|{'---|' * len(schemes)}",
        *(
            f"| {name} | {' | '.join(row.get(scheme, 'not run') for scheme in schemes)} |"
            for name, row in rows.items()
        ),
    ]
    notes = [f"{number}. {reason}" for reason, number in reasons.items()]
    return "\n".join([*lines, "", *notes] if notes else lines)


def read(page: str) -> dict[str, dict[str, str]]:
    """The verdicts of a page, by architecture and scheme, with the numbers of their reasons."""
    between = page.partition(BEGIN)[2].partition(END)[0]
    lines = [line for line in between.splitlines() if line.startswith("| ")]
    (_, *schemes), *rows = ([cell.strip() for cell in line.split("|")[1:-1]] for line in lines)
    return {name: dict(zip(schemes, cells, strict=True)) for name, *cells in rows}


def _short(why: str) -> str:
    """On one line, without what differs from layer to layer or from run to run."""
    line = " ".join(why.replace("|", "/").split())
    line = re.sub(r"layers\.\d+\.", "layers.*.", line)
    return line if len(line) <= _LONGEST else f"{line[:_LONGEST]} ..."
