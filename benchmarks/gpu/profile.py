"""Where the time of one reload goes: Python's functions, torch's operators, CUDA's calls.

Tables as text, beside the other results. Watched, a reload takes longer than it does; what counts
is how often something is called, and its share.
"""

from __future__ import annotations

import cProfile
import io
import pstats
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from torch import Tensor
from torch.profiler import ProfilerActivity
from torch.profiler import profile as torch_profile

from benchmarks import environment
from benchmarks.gpu.facts import Facts
from benchmarks.gpu.modes import MODES, generate
from benchmarks.results import markdown, milliseconds, save_text

_WARM_UP = 3  # reloads: plans are made, kernels compiled, memory is pinned
_ROWS = 60


def run(path: Path, schemes: Sequence[str], mode: str, facts: Facts, out: Path) -> None:
    """One engine a scheme, one after another."""
    environment.prepare()
    import flashquant
    from flashquant.patches.diagnostics import bench
    from flashquant.plan import named_tensors

    flashquant.patch()
    lines = []
    for scheme in schemes:
        llm = facts.guarded(
            f"start in {scheme}", lambda scheme=scheme: bench.start(path, scheme, **MODES[mode])
        )
        if llm is None:
            continue
        generate(llm)
        device = llm.apply_model(lambda model: next(model.parameters()).device)[0]
        weights = {name: tensor.to(device) for name, tensor in named_tensors(path)}
        sync = bench.whole(llm, atomic=True)
        report = [sync(weights) for _ in range(_WARM_UP)][-1]
        phases = ", ".join(f"{name} {milliseconds(s)}" for name, s in report.phases.items())
        facts.tell(f"reload in {scheme}", f"{milliseconds(report.seconds)}: {phases}")
        lines.append([scheme, milliseconds(report.seconds), phases])
        save_text(_of_python(sync, weights), out / f"gpu-profile-{scheme}-python.txt")
        save_text(_of_torch(sync, weights), out / f"gpu-profile-{scheme}-torch.txt")
    facts.keep(lines, markdown(("scheme", "reload", "phases"), lines), out)


def _of_python(sync: Any, weights: Mapping[str, Tensor]) -> str:
    watch, text = cProfile.Profile(), io.StringIO()
    watch.runcall(sync, weights)
    found = pstats.Stats(watch, stream=text)
    for order in ("tottime", "cumtime"):
        found.sort_stats(order).print_stats(_ROWS)
    return text.getvalue()


def _of_torch(sync: Any, weights: Mapping[str, Tensor]) -> str:
    with torch_profile(activities=[ProfilerActivity.CPU, ProfilerActivity.CUDA]) as watch:
        sync(weights)
    table: str = watch.key_averages().table(sort_by="self_cpu_time_total", row_limit=_ROWS)
    return table
