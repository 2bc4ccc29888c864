"""Verdicts as a markdown table; each reason once, as a numbered line below it."""

from __future__ import annotations

import re
import textwrap
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass

from tools.compatibility.cell import COLUMNS, Cell

_NOT_RUN = "not run"
_WORDS: Mapping[str, bool] = {"break_long_words": False, "break_on_hyphens": False}

_LONGEST, _WIDTH = 420, 100


@dataclass(frozen=True)
class Part:
    """One table of the page.

    Attributes:
        name: of its marks in the page.
        rows: architectures, in order.
        columns: schemes, or schemes over ranks.

    """

    name: str
    rows: Sequence[str]
    columns: Sequence[str]

    @property
    def begin(self) -> str:
        return f"<!-- {self.name}: begin -->"

    @property
    def end(self) -> str:
        return f"<!-- {self.name}: end -->"

    def merged(self, page: str, found: Sequence[Cell]) -> str:
        """The table of a page, with what was found in place of what it says."""
        known = {(cell.architecture, cell.scheme): cell for cell in (*self._cells(page), *found)}
        order = ((row, column) for row in self.rows for column in self.columns)
        return markdown([known[one] for one in order if one in known], self.columns)

    def read(self, page: str) -> dict[str, dict[str, str]]:
        """The verdicts of a page, by architecture and column, with the numbers of their reasons."""
        lines = [line for line in self._between(page) if line.startswith("| ")]
        (_, *columns), *rows = ([c.strip() for c in line.split("|")[1:-1]] for line in lines)
        return {name: dict(zip(columns, cells, strict=True)) for name, *cells in rows}

    def _cells(self, page: str) -> Iterator[Cell]:
        reasons = self._reasons(page)
        for architecture, verdicts in self.read(page).items() if self._between(page) else ():
            for column, shown in verdicts.items():
                verdict, _, number = shown.partition(" (")
                if verdict != _NOT_RUN:
                    why = reasons[number.rstrip(")")] if number else ""
                    yield Cell(architecture, column, verdict, why)

    def _reasons(self, page: str) -> dict[str, str]:
        reasons: dict[str, str] = {}
        last = ""
        for line in self._between(page):
            if found := re.match(r"(\d+)\. (.*)", line):
                last = found[1]
                reasons[last] = found[2]
            elif last and line.strip():
                reasons[last] += f" {line.strip()}"
        return reasons

    def _between(self, page: str) -> list[str]:
        text = page.partition(self.begin)[2].partition(self.end)[0]
        return text.splitlines() if text.strip() else []


def markdown(cells: Sequence[Cell], columns: Sequence[str] = COLUMNS) -> str:
    """One row an architecture, one column a scheme."""
    reasons: dict[str, int] = {}
    rows: dict[str, dict[str, str]] = {}
    for cell in cells:
        shown = cell.verdict
        if cell.why:
            shown += f" ({reasons.setdefault(_short(cell.why), len(reasons) + 1)})"
        rows.setdefault(cell.architecture, {})[cell.scheme] = shown
    schemes = [column for column in columns if any(column in row for row in rows.values())]
    lines = [
        f"| architecture | {' | '.join(schemes)} |",
        f"|---|{'---|' * len(schemes)}",
        *(
            f"| {name} | {' | '.join(row.get(scheme, _NOT_RUN) for scheme in schemes)} |"
            for name, row in rows.items()
        ),
    ]
    notes = [
        textwrap.fill(f"{number}. {reason}", _WIDTH, subsequent_indent="   ", **_WORDS)
        for reason, number in reasons.items()
    ]
    return "\n".join([*lines, "", *notes] if notes else lines)


def _short(why: str) -> str:
    """On one line, without what differs from layer to layer or from run to run."""
    line = " ".join(why.replace("|", "/").split())
    line = re.sub(r"layers\.\d+\.", "layers.*.", line)
    return line if len(line) <= _LONGEST else f"{line[:_LONGEST]} ..."
