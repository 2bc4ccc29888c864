"""The compatibility table, and its place in a file."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from tools.versions.trial import LACKS, Outcome, Seams

BEGIN, END = "<!-- versions: begin -->", "<!-- versions: end -->"

HEADER = ("vLLM", "build", "seams", "passed", "skipped", "failed", "what is missing")


@dataclass(frozen=True)
class Row:
    """One version. Without an outcome, nothing was run on it, for the reason given."""

    version: str
    build: str
    seams: Seams
    outcome: Outcome | None
    not_run: str = ""

    @property
    def is_well(self) -> bool:
        """Whether everything that was looked at is as it should be."""
        ran = self.outcome is None or (self.outcome.passed > 0 and not self.outcome.failed)
        return ran and not self.seams.misfits

    def cells(self) -> tuple[str, ...]:
        seams = f"{self.seams.fit}/{self.seams.total}"
        if self.outcome is None:
            return (self.version, self.build, seams, "", "", "", self.not_run)
        counts = (self.outcome.passed, sum(self.outcome.skipped.values()), len(self.outcome.failed))
        missing = "; ".join(self.outcome.lacks) or "nothing"
        return (self.version, self.build, seams, *map(str, counts), missing)


def markdown(rows: Sequence[Row]) -> str:
    """The table, and what was skipped for the machine's sake."""
    lines = [HEADER, ("---",) * len(HEADER), *(row.cells() for row in rows)]
    table = [f"| {' | '.join(cells)} |" for cells in lines]
    reasons = sorted(
        {
            reason
            for row in rows
            if row.outcome is not None
            for reason in row.outcome.skipped
            if not reason.startswith(LACKS)
        }
    )
    if reasons:
        table += ["", f"Skipped for another reason: {'; '.join(reasons)}."]
    return "\n".join(table)


def put_into(file: Path, text: str, begin: str = BEGIN, end: str = END) -> None:
    """Replace what stands between two marks.

    Raises:
        ValueError: the file has no such place, or several.

    """
    content = file.read_text()
    if content.count(begin) != 1 or content.count(end) != 1:
        raise ValueError(f"{file} should hold {begin} and {end} once each, on lines of their own")
    before, _, rest = content.partition(begin)
    _, _, after = rest.partition(end)
    file.write_text(f"{before}{begin}\n\n{text}\n\n{end}{after}")
