"""How long does a prepared update keep a busy engine from generating?

As `benchmarks.pause`, which says more: an engine core in a process of its own, clients that do not
stop, updates by path with `prepare=True`; the pause beside the copy of what the kernels read.
"""

from __future__ import annotations

import asyncio
import os
from collections.abc import Sequence
from pathlib import Path

from benchmarks import environment, under_load
from benchmarks.gpu.facts import Facts
from benchmarks.gpu.modes import MODES
from benchmarks.results import markdown

CLIENTS = 4


def run(
    path: Path, schemes: Sequence[str], mode: str, rounds: int, facts: Facts, out: Path
) -> None:
    """Measure, tell, keep; an engine core each, one after another."""
    environment.prepare()
    os.environ["VLLM_ENABLE_V1_MULTIPROCESSING"] = "1"
    # What counts the copies travels to the engine core by pickle.
    os.environ["VLLM_ALLOW_INSECURE_SERIALIZATION"] = "1"
    os.environ["VLLM_WORKER_MULTIPROC_METHOD"] = "spawn"
    from flashquant.patches.diagnostics import room_for_others

    options = MODES[mode] | room_for_others()
    found = {}
    for scheme in schemes:
        os.environ["FLASHRL_CONFIG"] = scheme
        work = under_load.measure(path, [path], rounds, CLIENTS, **options)
        seen = facts.guarded(scheme, lambda w=work: asyncio.run(w))
        if seen is not None:
            found[scheme] = seen
            cells = zip(under_load.TITLES[1:], under_load.row(scheme, seen)[1:], strict=True)
            facts.tell(scheme, ", ".join(f"{title} {cell}" for title, cell in cells))
    rows = [under_load.row(scheme, seen) for scheme, seen in found.items()]
    head = f"{path.name}, {mode}, {CLIENTS} clients, medians of {rounds} updates"
    facts.keep(found, f"{head}\n\n{markdown(under_load.TITLES, rows)}", out)
