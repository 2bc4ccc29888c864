"""What measurements have in common once they are taken: the machine, tables, files, pictures."""

from __future__ import annotations

import dataclasses
import importlib.util
import json
import os
import platform
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch


def machine() -> dict[str, str]:
    """What a number from here must be read with."""
    facts = {
        "cpu": cpu_model(),
        "cores": str(len(os.sched_getaffinity(0))),
        "AVX-512": "yes" if torch.cpu._is_avx512_supported() else "no",
        "AMX": "yes" if torch.cpu._is_amx_tile_supported() else "no",
        "torch": torch.__version__,
    }
    if importlib.util.find_spec("vllm") is None:
        return facts
    import vllm

    return facts | {"vllm": vllm.__version__}


def cpu_model() -> str:
    """The name in /proc/cpuinfo, or whatever Python knows."""
    cpuinfo = Path("/proc/cpuinfo")
    lines = cpuinfo.read_text().splitlines() if cpuinfo.exists() else []
    names = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
    return names[0] if names else platform.processor() or platform.machine()


def described(facts: dict[str, str]) -> str:
    """One line of them."""
    return ", ".join(f"{fact}: {value}" for fact, value in facts.items())


def markdown(titles: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
    """A table: first column to the left, numbers to the right."""
    lines = [titles, (":--", *["--:"] * (len(titles) - 1)), *rows]
    return "\n".join(f"| {' | '.join(cells)} |" for cells in lines)


def milliseconds(seconds: float) -> str:
    return f"{seconds * 1e3:.1f} ms"


def save_json(found: Any, facts: dict[str, str], path: Path) -> Path:
    """Every number, with the machine it was measured on."""
    path.parent.mkdir(parents=True, exist_ok=True)
    text = json.dumps({"machine": facts, "found": found}, indent=1, default=_plain)
    path.write_text(text + "\n")
    return path


def earlier(path: Path) -> list[dict[str, Any]]:
    """What an earlier run wrote to this file, so that a few schemes can be measured at a time."""
    found: list[dict[str, Any]] = json.loads(path.read_text())["found"] if path.exists() else []
    return found


def _plain(value: Any) -> Any:
    if dataclasses.is_dataclass(value) and not isinstance(value, type):
        return dataclasses.asdict(value)
    raise TypeError(f"{type(value).__name__} is no plain data")


def save_text(text: str, path: Path) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(text + "\n")
    return path


@contextmanager
def save_plot(path: Path, **figure: Any) -> Iterator[Any]:
    """Axes to draw on; the picture is written when the block ends."""
    from matplotlib.figure import Figure

    drawing = Figure(layout="constrained", **figure)
    axes = drawing.subplots()
    axes.spines[["top", "right"]].set_visible(False)
    yield axes
    path.parent.mkdir(parents=True, exist_ok=True)
    drawing.savefig(path, dpi=150)
