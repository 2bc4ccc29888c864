"""A line a fact, as soon as it is known; for people, or for programs that read JSON."""

from __future__ import annotations

import json
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any, Literal

from benchmarks.results import described, machine, save_json, save_text
from flashquant.errors import UnsupportedEngine

Verdict = Literal["ok", "skipped", "fails"]


class Facts:
    """What one part tells, and keeps."""

    def __init__(self, topic: str, *, as_json: bool) -> None:
        self._topic, self._as_json = topic, as_json
        self.has_failures = False

    def tell(self, name: str, detail: str, verdict: Verdict = "ok") -> None:
        """One line, on standard output."""
        self.has_failures |= verdict == "fails"
        if self._as_json:
            fact = {"topic": self._topic, "name": name, "verdict": verdict, "detail": detail}
            line = json.dumps(fact)
        else:
            line = f"{name}: {'' if verdict == 'ok' else f'{verdict}: '}{detail}"
        sys.stdout.write(f"{line}\n")
        sys.stdout.flush()

    def fails(self, name: str, failure: Exception) -> None:
        """One thing could not be measured; the others can."""
        said = " ".join(str(failure).split())[:300]
        # What flashquant refuses by name is no failure.
        verdict: Verdict = "skipped" if isinstance(failure, UnsupportedEngine) else "fails"
        self.tell(name, f"{type(failure).__name__}: {said}", verdict)

    def guarded(self, name: str, work: Callable[[], Any]) -> Any:
        """What the work returns, or None after it has been told that it failed."""
        try:
            return work()
        except Exception as failure:  # whatever it is, the others are still measured
            self.fails(name, failure)
            return None

    def keep(self, found: Any, table: str, out: Path) -> None:
        """The numbers and their table, as files."""
        facts = machine() | {"device": device_name()}
        save_json(found, facts, out / f"gpu-{self._topic}.json")
        save_text(f"{described(facts)}\n\n{table}", out / f"gpu-{self._topic}.md")


def device_name() -> str:
    """The card, or that there is none."""
    import torch

    if not torch.cuda.is_available():
        return "cpu, a rehearsal"
    return torch.cuda.get_device_name()
