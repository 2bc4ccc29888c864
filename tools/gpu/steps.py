"""What is run on a GPU machine, most valuable facts first; each step a program with a limit."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from dataclasses import dataclass, field, replace
from pathlib import Path

_DENSE = ("fp8_channel", "int8", "fp8_vllm", "fp8_tensor", "fp8_block", "bf16")
# Served with graphs only: Machete packs int4 and int4_channel, Marlin the others.
_PACKED = ("int4", "nvfp4", "mxfp8", "int4_g32", "int4_channel")
# Files of tests/engine whose engines run in one process, eagerly, each a step: first those that
# have not been well on a GPU yet, then those that have.
_NEW_TESTS = ("on_gpu", "undo_in_cache", "faults", "delta", "tied", "kept_layers", "doors")
_TESTS = (
    "reload_equals_restart",
    "prepare",
    "engine_state",
    "transfer",
    "profiles",
    "moe",
    "async_scheduling",
    "kv_cache",
)
_V1 = {"VLLM_USE_V2_MODEL_RUNNER": "0"}
_TRITON = ("--attention", "TRITON_ATTN")
_IMPORT = 20  # seconds of a doctor's own, before it looks at a scheme
_PATIENCE = 4  # times the limits, on a CPU
_DOCTOR = "import sys; from flashquant.cli.main import main; sys.exit(main())"


@dataclass(frozen=True)
class Way:
    """How engines are served, where vLLM's own choice does not run."""

    arguments: tuple[str, ...] = ()
    env: dict[str, str] = field(default_factory=dict)

    def __str__(self) -> str:
        settings = [f"{name}={value}" for name, value in self.env.items()]
        return " ".join((*settings, *self.arguments)) or "vLLM's own choice"


# Tried in order by the step `serve`; what works is kept for the doctor's steps after it.
WAYS = (Way(), Way(_TRITON), Way(env=_V1), Way(_TRITON, _V1))


@dataclass(frozen=True)
class Step:
    """One program.

    Attributes:
        name: unique; what is before the first dash is its group.
        command: without the interpreter.
        seconds: after which it is ended.
        is_alone: nothing else runs meanwhile, for it measures. Neighbours that do not may run
            together.
        env: beside everything else.
        tries_ways: run again, another way, until vLLM serves.

    """

    name: str
    command: tuple[str, ...]
    seconds: int
    is_alone: bool = False
    env: dict[str, str] = field(default_factory=dict)
    tries_ways: bool = False

    @property
    def group(self) -> str:
        return self.name.split("-")[0]

    @property
    def shares(self) -> bool:
        """Whether others may run at the same time: it measures nothing, and decides nothing."""
        return not (self.is_alone or self.tries_ways)

    @property
    def serves(self) -> bool:
        """Whether it starts engines that may have to be served another way."""
        return self.command[0] == "-c"


def steps(device: str, work: Path, scratch: Path) -> list[Step]:
    """All of them.

    Args:
        device: cuda, or cpu for a rehearsal, which takes longer.
        work: a folder for what is measured.
        scratch: one for checkpoints.

    """
    found = [
        Step("machine", ("-m", "tools.gpu.machine", "--device", device), 120, is_alone=True),
        Step("libraries", ("-m", "tools.gpu.libraries", "--device", device), 150, is_alone=True),
        Step("kernels", ("-c", _DOCTOR, "doctor", "--lines"), 150, is_alone=True),
        doctor("serve", device, "bf16", "eager", seconds=120),
        doctor("new-graphs-deepseek-v2", device, "int8", "graphs", "deepseek-v2"),
        doctor("new-eager-qwen3-moe-mxfp8", device, "mxfp8", "eager", "qwen3-moe"),
        *map(_tests, _NEW_TESTS),
        *_doctors(device),
        *map(_tests, _TESTS),
        *_benchmarks(device, work, scratch),
        *_more(device),
    ]
    found.sort(key=lambda step: _RANK.get(step.group, 0))
    if device == "cuda":
        return found
    return [replace(step, seconds=step.seconds * _PATIENCE) for step in found]


# All doctors together, for their time is spent on starting; then speed.
_RANK = {
    **dict.fromkeys(("new", "eager", "graphs", "experts", "more", "tests"), 1),
    "bench": 2,
    "speed": 3,
}


def doctor(
    name: str,
    device: str,
    scheme: str,
    mode: str,
    model: str = "llama",
    seconds: int = 240,
    arguments: tuple[str, ...] = (),
    **env: str,
) -> Step:
    """Engines of one scheme: vLLM's on B beside flashquant's that goes from A to B and back."""
    where = "--gpu" if device == "cuda" else "--engine"
    limit = (seconds - _IMPORT) * (1 if device == "cuda" else _PATIENCE)
    command = ("-c", _DOCTOR, "doctor", where, "--lines", "--engines-only", "--scheme", scheme)
    command += ("--mode", mode, "--model", model, "--limit", str(limit), *arguments)
    return Step(name, command, seconds, env=env, tries_ways=name == "serve")


def _doctors(device: str) -> Iterator[Step]:
    for mode, schemes in (("eager", _DENSE), ("graphs", (*_DENSE, *_PACKED))):
        for scheme in schemes:
            if (scheme, mode) != ("bf16", "eager"):  # that was `serve`
                yield doctor(f"{mode}-{scheme}", device, scheme, mode)
    yield doctor("graphs-qwen3-moe", device, "int8", "graphs", "qwen3-moe")
    for scheme in ("bf16", "int8", "fp8_block"):
        yield doctor(f"experts-qwen3-moe-{scheme}", device, scheme, "eager", "qwen3-moe")
    for scheme in ("bf16", "int8", "fp8_channel"):
        yield doctor(f"experts-deepseek-v2-{scheme}", device, scheme, "eager", "deepseek-v2")


def _tests(file: str) -> Step:
    """The suite's own, which look at what a doctor does not."""
    return Step(f"tests-{file}", ("-m", "tools.gpu.suite", f"tests/engine/test_{file}.py"), 300)


def _benchmarks(device: str, work: Path, scratch: Path) -> Iterator[Step]:
    """`bench`, what matters most; `speed`, all the rest."""
    first = {
        "kernels": 120,
        "profile-0.5b-eager": 150,
        "reload-0.5b-eager": 180,
        "reload-1.5b-graphs": 240,
        "pause-1.5b-graphs": 240,
    }
    rest = {
        "reload-7b-eager-fp8_channel": 240,
        "reload-7b-eager-int8": 240,
        "reload-qwen3-moe-eager": 180,
        "reload-deepseek-v2-eager": 180,
        "reload-7b-eager-fp8_vllm": 240,
        "reload-7b-eager-fp8_block": 240,
        "reload-7b-eager-bf16": 240,
        "reload-7b-graphs-fp8_channel": 240,
        "reload-0.5b-graphs": 180,
        "reload-1.5b-eager": 240,
        "pause-0.5b-eager": 300,
        "reload-qwen3-moe-graphs": 180,
        "reload-deepseek-v2-graphs": 180,
    }
    small = () if device == "cuda" else ("--small", "--rounds", "2")
    for group, parts in (("bench", first), ("speed", rest)):
        for part, seconds in parts.items():
            command = ("-m", "benchmarks.gpu", "--part", part, "--lines", "--device", device)
            command += ("--scratch", str(scratch), "--out", str(work / "tables"))
            yield Step(f"{group}-{part}", command + small, seconds, is_alone=True)


def _more(device: str) -> Iterator[Step]:
    """Other ways of running."""
    yield doctor("more-compiled-fp8_channel", device, "fp8_channel", "compiled", seconds=300)
    yield doctor("more-compiled-int8", device, "int8", "compiled", seconds=300)
    yield doctor("more-runner-v1", device, "fp8_channel", "graphs", **_V1)
    yield doctor("more-triton-attention", device, "fp8_channel", "eager", arguments=_TRITON)
    deep = {"VLLM_USE_DEEP_GEMM": "1", "VLLM_MOE_USE_DEEP_GEMM": "1"}
    yield doctor("more-deep-gemm", device, "fp8_block", "eager", seconds=300, **deep)


def chosen(found: list[Step], only: list[str], skip: list[str]) -> list[Step]:
    """By the beginnings of names, in the order in which these are given; the machine always."""
    wanted = ("machine", *only) if only else ("",)
    kept = [
        step
        for step in found
        if step.name.startswith(wanted) and not (skip and step.name.startswith(tuple(skip)))
    ]
    return sorted(
        kept, key=lambda step: [step.name.startswith(start) for start in wanted].index(True)
    )


def interpreted(step: Step, way: Way) -> list[str]:
    """The whole command of a step, another way if it serves."""
    is_doctor = step.serves and "--engines-only" in step.command
    return [sys.executable, *step.command, *(way.arguments if is_doctor else ())]
