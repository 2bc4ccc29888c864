"""A stack's program in a process of its own, and what a fresh engine answers there."""

from __future__ import annotations

import json
import subprocess
import sys
from typing import Any

from tests.stacks import overlays
from tools.models.policies import Policies


def fresh(
    stack: str, policies: Policies, *, scheme: str, vllm: str, **more: str
) -> tuple[Any, Any]:
    """What engines that start on policy A and on policy B say: digest, tokens, log-probs."""
    started = _STARTED.get((scheme, vllm))
    if started is None:
        paths = (policies.bf16("a"), policies.bf16("b"))
        started = run(stack, "fresh", *paths, scheme=scheme, vllm=vllm, **more)
        _STARTED[scheme, vllm] = started
    return started["a"], started["b"]


_STARTED: dict[tuple[str, str], dict[str, Any]] = {}


def run(
    stack: str,
    program: str,
    *arguments: object,
    scheme: str,
    vllm: str = overlays.NEWEST,
    **more: str,
) -> dict[str, Any]:
    """What a program of `tests/stacks/programs` answers, with its stack importable.

    Args:
        vllm: a version, or `overlays.NEWEST`.
        more: environment variables.

    """
    environment = {
        "FLASHRL_CONFIG": scheme,
        "VLLM_ENABLE_V1_MULTIPROCESSING": "1",
        "VLLM_ALLOW_INSECURE_SERIALIZATION": "1",  # the stacks set it: they send dtypes and handles
    }
    answer = subprocess.run(
        [sys.executable, "-m", f"tests.stacks.programs.{program}", *map(str, arguments)],
        cwd=overlays.ROOT,
        env={**overlays.environment(stack, vllm), **environment, **more},
        capture_output=True,
        text=True,
        timeout=570,
        check=False,
    )
    lines = [line for line in answer.stdout.splitlines() if line.startswith("RESULT ")]
    assert lines, f"{answer.stdout[-2000:]}\n{answer.stderr[-6000:]}"
    # Other processes write to the same pipe, and not always whole lines.
    result, _ = json.JSONDecoder().raw_decode(lines[-1].removeprefix("RESULT "))
    return dict(result)
