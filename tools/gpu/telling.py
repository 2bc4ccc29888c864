"""How a step of the kit tells what it finds: a line of JSON a fact, on standard output."""

from __future__ import annotations

import json
import sys
import traceback
from collections.abc import Callable
from typing import Literal


def tell(name: str, detail: str, verdict: Literal["ok", "fails", "skipped"] = "ok") -> None:
    """One fact."""
    sys.stdout.write(json.dumps({"name": name, "verdict": verdict, "detail": detail}) + "\n")
    sys.stdout.flush()


def guarded(name: str, look: Callable[[], str]) -> bool:
    """What a look returns is a fact, and what it raises is one, too; whether it was well."""
    try:
        detail = look()
    except Exception as failure:  # whatever it is, the others are still looked at
        traceback.print_exc()
        tell(name, f"{type(failure).__name__}: {failure}"[:600], "fails")
        return False
    tell(name, detail)
    return True
