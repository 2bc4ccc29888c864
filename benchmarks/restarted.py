"""What a restart costs: a new process, until its engine has started, or has generated.

    python -m benchmarks.restarted PATH CONFIG [--mode eager|graphs]

With a mode, an engine as `benchmarks.gpu` starts it, which then generates.
"""

from __future__ import annotations

import argparse
import subprocess
import sys
import time
from pathlib import Path

from benchmarks import environment


def seconds(path: Path, config: str, mode: str | None = None) -> float:
    """How long a new process takes.

    Args:
        path: a checkpoint.
        config: what FLASHRL_CONFIG says.
        mode: one of `benchmarks.gpu.modes.MODES`.

    Raises:
        subprocess.CalledProcessError: it failed; what it said is in `stderr`.

    """
    command = [sys.executable, "-m", "benchmarks.restarted", str(path), config]
    command += ["--mode", mode] if mode else []
    began = time.perf_counter()
    subprocess.run(command, check=True, capture_output=True, text=True)
    return time.perf_counter() - began


def main() -> None:
    """Be that process."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.restarted", description=__doc__)
    parser.add_argument("path", type=Path)
    parser.add_argument("config")
    parser.add_argument("--mode")
    options = parser.parse_args()
    environment.prepare()
    import flashquant
    from flashquant.patches.diagnostics import bench

    flashquant.patch()
    if options.mode is None:
        bench.start(options.path, options.config)
        return
    from benchmarks.gpu.modes import MODES, generate

    generate(bench.start(options.path, options.config, **MODES[options.mode]))


if __name__ == "__main__":
    main()
