"""The machine: its GPU, driver and versions, and how fast it copies.

python -m tools.gpu.machine [--device cpu]
"""

from __future__ import annotations

import argparse
import os
import platform
import shutil
import subprocess
import time
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from statistics import median

from tools.gpu.telling import guarded, tell

_PACKAGES = ("triton", "transformers", "numpy", "numba", "flashquant")
_PROJECT = Path(__file__).parents[2]
_COPIED = 1 << 30  # bytes
_ROUNDS = 15


def main() -> None:
    """Look at each."""
    parser = argparse.ArgumentParser(prog="python -m tools.gpu.machine")
    parser.add_argument("--device", default="cuda")
    on_gpu = parser.parse_args().device == "cuda"
    if on_gpu:
        guarded("nvidia-smi", _nvidia_smi)
    else:
        tell("device", "the CPU: a rehearsal, no number counts")
    guarded("host", _host)
    guarded("versions", _versions)
    guarded("commit", lambda: commit(_PROJECT))
    if on_gpu:
        guarded("gpu", _gpu)
        # Without it, DeepGEMM cannot compile its kernels; nothing else asks for it.
        guarded("nvcc", lambda: _last_line("nvcc", "--version") if shutil.which("nvcc") else "none")


def _nvidia_smi() -> str:
    fields = "name,driver_version,memory.total,clocks.max.sm,clocks.max.mem"
    return _last_line("nvidia-smi", f"--query-gpu={fields}", "--format=csv,noheader")


def _host() -> str:
    return f"{platform.platform()}, {len(os.sched_getaffinity(0))} cores"


def _versions() -> str:
    began = time.perf_counter()
    import torch

    seconds = time.perf_counter() - began
    found = [f"python {platform.python_version()}", f"torch {torch.__version__} ({seconds:.0f} s)"]
    return ", ".join([*found, *(_version(name) for name in _PACKAGES)])


def commit(project: Path) -> str:
    """Which one a checkout is; or was, when it was packed."""
    if (packed := project / "COMMIT").exists():
        return packed.read_text()
    try:
        return _last_line("git", "-C", str(project), "describe", "--always", "--dirty")
    except (OSError, subprocess.CalledProcessError):
        return "unknown: no git checkout"


def _version(name: str) -> str:
    try:
        return f"{name} {version(name)}"
    except PackageNotFoundError:
        return f"no {name}"


def _gpu() -> str:
    import torch

    properties = torch.cuda.get_device_properties(0)
    one = torch.empty(_COPIED, dtype=torch.uint8, device="cuda")
    other = torch.empty_like(one)
    taken = []
    for _ in range(_ROUNDS):
        begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        begin.record()
        other.copy_(one)
        end.record()
        end.synchronize()
        taken.append(begin.elapsed_time(end) / 1e3)
    rate = 2 * _COPIED / median(taken) / 1e12
    capability = f"{properties.major}.{properties.minor}"
    return f"{properties.name} ({capability}), copies at {rate:.2f} TB/s, read and written"


def _last_line(*command: str) -> str:
    answer = subprocess.run(command, capture_output=True, text=True, check=True)
    return answer.stdout.strip().splitlines()[-1]


if __name__ == "__main__":
    main()
