"""`flashquant.tis` belongs to the trainer's side: torch, and nothing else of flashquant."""

from __future__ import annotations

import subprocess
import sys

from flashquant import tis


def test_it_imports_no_engine_and_no_other_room():
    code = "import sys; from flashquant import tis; print(*sys.modules)"
    done = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, timeout=120, check=True
    )

    modules = done.stdout.split()
    rooms = {name.split(".")[1] for name in modules if name.startswith("flashquant.")}
    assert rooms == {"api", "errors", "tis"}  # the front door is passed on the way, and is light
    assert "torch" in modules
    assert "vllm" not in modules


def test_all_is_there_once():
    assert len(tis.__all__) == len(set(tis.__all__))
    assert all(getattr(tis, name) for name in tis.__all__)
