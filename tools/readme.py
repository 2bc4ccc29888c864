"""Write the short table of README.md out of the long ones in docs/performance.md.

    python -m tools.readme

The medians are those of `python -m benchmarks.sync_latency`, of the model that README names.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from pathlib import Path

from tools.versions.table import put_into

ROOT = Path(__file__).parents[1]
README, PERFORMANCE = ROOT / "README.md", ROOT / "docs/performance.md"
BEGIN, END = "<!-- performance: begin -->", "<!-- performance: end -->"

MODEL = "smollm2"
SCHEMES = ("bf16", "int8", "fp8_vllm", "fp8_channel")
ROWS = {  # what README says -> the row of the long table; {} is vLLM's name of the scheme
    "`reload_weights`, all proofs": "flashquant",
    "without undo log and digest": "flashquant, atomic=False, no digest",
    "vLLM's own reload in this scheme": "vLLM's own reload, {}",
    "engine restart, new process": "a new engine, new process",
}
NATIVE = {
    "bf16": "bf16",
    "int8": "int8 <- int8",
    "fp8_vllm": "fp8_per_tensor",
    "fp8_channel": "fp8_per_channel",
}


def medians(page: str, model: str = MODEL) -> dict[str, dict[str, str]]:
    """Scheme -> what was timed -> its median, of one model's tables in the page."""
    found: dict[str, dict[str, str]] = {}
    scheme = ""
    for first, second in _first_cells(page, model):
        if second == "median" and first in SCHEMES:
            scheme = first
        elif second == "median":
            scheme = ""
        elif scheme:
            found.setdefault(scheme, {})[first] = second
    return found


def _first_cells(page: str, model: str) -> Iterator[tuple[str, str]]:
    """The first two cells of each row, from the line that names the model to the next model's."""
    there = False
    for line in page.splitlines():
        if ": " in line and " tensors, " in line and line.endswith(" rounds"):
            there = line.startswith(f"{model}: ")
        elif line.startswith(("<!-- END", "#")):
            there = False
        elif there and line.startswith("| ") and not line.startswith("| :--"):
            cells = [cell.strip() for cell in line.strip("|").split("|")]
            yield cells[0], cells[1]


def table(found: Mapping[str, Mapping[str, str]]) -> str:
    """The four rows."""
    lines = [("", *SCHEMES), ("---", *["--:"] * len(SCHEMES))]
    for title, row in ROWS.items():
        lines.append((title, *(found[one][row.format(NATIVE[one])] for one in SCHEMES)))
    return "\n".join(f"| {' | '.join(cells)} |" for cells in lines)


def main() -> int:
    """Write it."""
    put_into(README, table(medians(PERFORMANCE.read_text())), BEGIN, END)
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
