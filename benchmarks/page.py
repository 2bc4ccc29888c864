"""Put what the benchmarks wrote into docs/performance.md: tables between marks, pictures beside it.

    python -m benchmarks.page [--out benchmarks/out]

A mark is `<!-- RESULT name.md -->`, and ends at `<!-- END -->`. A name may hold a `*`: all files
that match, in order of size of name. What has not been measured keeps what it had.
"""

from __future__ import annotations

import argparse
import re
import shutil
from pathlib import Path

_DOCS = Path(__file__).parents[1] / "docs"
_MARK = re.compile(r"<!-- RESULT (\S+) -->\n(.*?)<!-- END -->", re.DOTALL)


def filled(page: str, out: Path) -> str:
    """The page with every table that there is a file for."""

    def table(mark: re.Match[str]) -> str:
        pattern, old = mark.groups()
        files = sorted(out.glob(pattern), key=lambda file: (len(file.name), file.name))
        new = "\n\n".join(file.read_text().strip() for file in files)
        body = f"\n{new}\n\n" if files else old
        return f"<!-- RESULT {pattern} -->\n{body}<!-- END -->"

    return _MARK.sub(table, page)


def main(argv: list[str] | None = None) -> int:
    """Fill in, copy, and say what is missing."""
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.page", description="results into docs/performance.md"
    )
    parser.add_argument("--out", type=Path, default=Path("benchmarks/out"))
    arguments = parser.parse_args(argv)
    page = _DOCS / "performance.md"
    text = page.read_text()
    page.write_text(filled(text, arguments.out))
    for pattern, _ in _MARK.findall(text):
        found = sorted(file.name for file in arguments.out.glob(pattern))
        print(f"{pattern}: {', '.join(found) or 'nothing; the page keeps what it had'}")
    for picture in re.findall(r"\]\(([\w.-]+\.png)\)", text):
        if (arguments.out / picture).exists():
            shutil.copy(arguments.out / picture, _DOCS / picture)
            print(f"docs/{picture}")
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
