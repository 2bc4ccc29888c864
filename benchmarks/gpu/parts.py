"""Which measurements there are, in the order of what they tell; and the models they need."""

from __future__ import annotations

import shutil
import tempfile
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Literal

import torch

from benchmarks import shapes
from benchmarks.gpu.facts import Facts

SCHEMES = ("bf16", "int8", "fp8_vllm", "fp8_channel", "fp8_block")
_MARGIN = 2  # times the size of a checkpoint has to be free where it is written


@dataclass(frozen=True)
class Part:
    """One measurement, in a process of its own.

    Attributes:
        name: unique.
        section: what is measured.
        model: a key of `shapes.CONFIGS`, or a tiny one of flashquant's doctor.
        mode: eager, or with CUDA graphs.
        schemes: side by side in this process.
        seconds: after which it is ended.

    """

    name: str
    section: Literal["kernels", "reload", "pause", "profile"]
    model: str = ""
    mode: str = "eager"
    schemes: tuple[str, ...] = SCHEMES
    seconds: int = 180


_LARGE = "qwen2.5-7b"
PARTS = (
    Part("kernels", "kernels", seconds=120),
    Part("profile-0.5b-eager", "profile", "qwen2.5-0.5b", schemes=("int8", "bf16", "fp8_vllm")),
    Part("reload-0.5b-eager", "reload", "qwen2.5-0.5b"),
    Part("reload-1.5b-graphs", "reload", "qwen2.5-1.5b", "graphs", seconds=240),
    Part("pause-1.5b-graphs", "pause", "qwen2.5-1.5b", "graphs", ("int8", "fp8_channel"), 240),
    Part("reload-qwen3-moe-eager", "reload", "qwen3-moe"),
    Part("reload-deepseek-v2-eager", "reload", "deepseek-v2"),
    # One scheme a process: its engines, vLLM's two and the pushed tensors take 60 GB.
    *(
        Part(f"reload-7b-eager-{scheme}", "reload", _LARGE, "eager", (scheme,), 240)
        for scheme in ("fp8_channel", "int8", "fp8_vllm", "fp8_block", "bf16")
    ),
    Part("reload-7b-graphs-fp8_channel", "reload", _LARGE, "graphs", ("fp8_channel",), 240),
    Part("reload-0.5b-graphs", "reload", "qwen2.5-0.5b", "graphs"),
    Part("reload-1.5b-eager", "reload", "qwen2.5-1.5b", "eager", seconds=240),
    Part("pause-0.5b-eager", "pause", "qwen2.5-0.5b", "eager", SCHEMES, 300),
    Part("reload-qwen3-moe-graphs", "reload", "qwen3-moe", "graphs"),
    Part("reload-deepseek-v2-graphs", "reload", "deepseek-v2", "graphs"),
)


def chosen(only: list[str], *, small: bool) -> list[Part]:
    """Those whose names begin so; small, with a tiny model in place of each large one."""
    found = [part for part in PARTS if part.name.startswith(tuple(only or [""]))]
    if not small:
        return found
    return [replace(p, model="llama") if p.model.startswith("qwen2.5") else p for p in found]


def run(
    part: Part, *, device: str, small: bool, rounds: int, scratch: Path, facts: Facts, out: Path
) -> None:
    """One part, in this process."""
    from benchmarks.gpu import kernels, pause, profile, reload

    on = torch.device(device)
    if part.section == "kernels":
        kernels.run(on, rounds * 4, facts, out, small=small)
        return
    path = checkpoint(part.model, on, scratch)
    if part.section == "profile":
        profile.run(path, part.schemes, part.mode, facts, out)
    elif part.section == "reload":
        reload.run(path, part.schemes, part.mode, rounds, on, facts, out)
    else:
        pause.run(path, part.schemes, part.mode, rounds, facts, out)


def checkpoint(model: str, device: torch.device, scratch: Path) -> Path:
    """The folder of a bf16 checkpoint with random weights, written when it is first asked for.

    Raises:
        OSError: there is no room for it.

    """
    path = scratch / model
    if path.exists():
        return path
    scratch.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(prefix=f".{model}-", dir=scratch) as folder:
        made = Path(folder) / "a"
        if model.startswith("qwen2.5"):
            _check_room(model, scratch)
            made.mkdir()
            shapes.write(shapes.CONFIGS[model], made, device)
        else:
            from flashquant.patches.diagnostics.examination import policies

            policies.write(Path(folder), model)
        made.rename(path)
    return path


def _check_room(model: str, folder: Path) -> None:
    config = shapes.CONFIGS[model]
    need = 2 * sum(shape.numel() for shape in shapes.shapes(config).values())
    free = shutil.disk_usage(folder).free
    if free < _MARGIN * need:
        raise OSError(
            f"{folder} has {free / 1e9:.1f} GB free, and the checkpoint of {model} with room to "
            f"spare takes {_MARGIN * need / 1e9:.1f}. Name another folder with --scratch."
        )
