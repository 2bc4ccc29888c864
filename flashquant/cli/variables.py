"""`flashquant config --env`: every environment variable, and what it says now."""

from __future__ import annotations

import json
import os
import sys

from rich.markup import escape
from rich.table import Table

from flashquant.cli import output
from flashquant.config import env


def _table() -> Table:
    """Names stay whole on a terminal of 80 columns; what is set stands with what may be."""
    table = Table(box=None)
    table.add_column("variable", no_wrap=True)
    table.add_column("what it does", overflow="fold")
    for name, kind, unset, meaning in env.rows():
        now = os.environ.get(name, "")
        said = [f"[bold]now {escape(now)}[/]"] if now else []
        said += [kind, *([f"unset: {escape(unset)}"] if unset else [])]
        table.add_row(name, f"{escape(meaning)} ({'; '.join(said)})")
    return table


def tell(*, as_json: bool) -> int:
    """List them; what one says that is impossible is a ConfigError after the list."""
    if as_json:
        keys = ("name", "kind", "unset", "meaning")
        found = [dict(zip(keys, row, strict=True)) for row in env.rows()]
        for variable in found:
            variable["now"] = os.environ.get(variable["name"], "")
        sys.stdout.write(json.dumps(found, indent=2) + "\n")
    else:
        output.console().print(_table())
    env.check(os.environ)
    return 0
