"""Write the table of environment variables into its page: `python -m tools.environment [PAGE]`.

The table is that of `flashquant config --env`; a page has it between two markers.
"""

from __future__ import annotations

import sys
from pathlib import Path

from flashquant.config import env

BEGIN, END = "<!-- environment: begin -->", "<!-- environment: end -->"
PAGE = Path(__file__).parents[1] / "docs" / "environment.md"


def written(page: str) -> str:
    """The page with the table as it is now, between its markers."""
    before, begin, rest = page.partition(BEGIN)
    _, end, after = rest.partition(END)
    if not (begin and end):
        raise SystemExit(f"the page has no place for the table: put {BEGIN} and {END} into it")
    return f"{before}{BEGIN}\n\n{env.markdown()}\n\n{END}{after}"


if __name__ == "__main__":
    target = Path(sys.argv[1]) if len(sys.argv) > 1 else PAGE
    target.write_text(written(target.read_text()))
