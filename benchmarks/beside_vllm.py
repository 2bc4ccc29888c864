"""Where vLLM's own weight reload is silently wrong, and what flashquant does there.

    python -m benchmarks.beside_vllm

Both arms make the same call, `llm.collective_rpc("reload_weights", ...)`, with the same
tensors, on engines started from the same checkpoints; one has FLASHRL_CONFIG unset. Judged
exactly, by prompt log-probs and greedy tokens, against a fresh engine of the same arm:
a mean or a KL does not tell a stale 8-bit engine from an updated one.

Each arm is a process of its own, because being patched is a property of a process.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterator, Mapping
from contextlib import AbstractContextManager, nullcontext
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, TextIO
from unittest import mock

from torch import Tensor

from benchmarks import arms
from benchmarks.arms import ARMS, FLASHQUANT, NATIVE
from tools.models import tiny_models
from tools.models.policies import FP8, W8A8, Policies

TITLES = ("situation", "vLLM's own reload", "flashquant")

_LONE_SHARD = "model.layers.0.self_attn.q_proj.weight"
_PATIENCE = 300  # seconds for one arm; it takes about twenty


@dataclass(frozen=True)
class Row:
    """What one arm did in one situation.

    Attributes:
        equals_fresh: log-probs and tokens are those of a fresh engine on the pushed weights.
        equals_old: they are those of the same engine before the push.
        gap: largest difference from the fresh engine's prompt log-probs; NaN is served as NaN.
        error: name of the exception that the push raised.

    """

    situation: str
    equals_fresh: bool
    equals_old: bool
    gap: float
    error: str | None

    @property
    def verdict(self) -> str:
        """The row's cell in the table."""
        if self.error is not None:
            kept = f"refused: {self.error}, old weights still served"
            return kept if self.equals_old else f"raised {self.error}"
        if self.equals_fresh:
            return "equals a fresh start"
        return arms.silently_wrong(self.gap)


@dataclass(frozen=True)
class Situation:
    """One thing a trainer does.

    Attributes:
        old: the checkpoint that the live engine starts on.
        new: the one that a fresh engine starts on, for the comparison.
        push: what the trainer sends.
        config: what FLASHRL_CONFIG says in flashquant's arm.
        kernels: a block around the engines' creation and the push.

    """

    name: str
    old: Path
    new: Path
    push: Mapping[str, Tensor]
    config: str
    kernels: Callable[[], AbstractContextManager[object]] = nullcontext


def rows() -> list[tuple[str, str, str]]:
    """Run both arms, one after the other: situation, verdict on vLLM, verdict on flashquant."""
    native, ours = run(NATIVE), run(FLASHQUANT)
    return [
        (row.situation, row.verdict, other.verdict) for row, other in zip(native, ours, strict=True)
    ]


def run(arm: str) -> list[Row]:
    """Run one arm in a process of its own.

    Raises:
        RuntimeError: the process failed, or never came back; with the end of what it said.

    """
    command = [sys.executable, "-m", "benchmarks.beside_vllm", "--arm", arm, "--json"]
    try:
        result = subprocess.run(
            command,
            cwd=arms.ROOT,
            env=arms.environment(),
            capture_output=True,
            text=True,
            timeout=_PATIENCE,
        )
    except subprocess.TimeoutExpired as hung:
        raise RuntimeError(f"the {arm} arm hung for {_PATIENCE} s: {hung.stderr!r}") from hung
    if result.returncode != 0:
        raise RuntimeError(
            f"the {arm} arm ended with {result.returncode}:\n{result.stderr[-4000:]}"
        )
    return [Row(**row) for row in json.loads(result.stdout)]


def answer(arm: str) -> Iterator[Row]:
    """Live through every situation in this process."""
    arms.enable_amx()
    engines: list[Any] = []  # vLLM tears global state down when one of several is collected
    with tempfile.TemporaryDirectory() as folder:
        for situation in situations(Path(folder)):
            yield _judge(situation, arm, engines)


def situations(folder: Path) -> Iterator[Situation]:
    """The dense situations, each a promise that a weight reload makes."""
    tied, qwen2 = Policies(folder, "tied"), Policies(folder, "qwen2")
    new = qwen2.tensors("b")
    w8a8_a, w8a8_b = (qwen2.served(policy, W8A8) for policy in "ab")
    fp8_a, fp8_b = (qwen2.served(policy, FP8) for policy in "ab")
    codes = tiny_models.tensors(w8a8_b)
    yield Situation(
        "tied embeddings, bf16", tied.bf16("a"), tied.bf16("b"), tied.tensors("b"), "bf16"
    )
    yield Situation(
        "int8 tensors into an int8 engine (oneDNN kernel)", w8a8_a, w8a8_b, codes, "int8", onednn
    )
    yield Situation("bf16 tensors into an int8 engine", w8a8_a, w8a8_b, new, "int8")
    yield Situation("bf16 tensors into an fp8 engine", fp8_a, fp8_b, new, "fp8_channel")
    mixture = _with_one_shard(qwen2, folder / "qwen2-mixture")
    lone = {_LONE_SHARD: new[_LONE_SHARD]}
    yield Situation("`q_proj` without `k_proj`, `v_proj`", qwen2.bf16("a"), mixture, lone, "bf16")


def onednn() -> AbstractContextManager[object]:
    """Make vLLM serve int8 by oneDNN, as it does wherever a shape or a CPU does not suit AMX."""
    from vllm.model_executor.kernels.linear.scaled_mm import cpu

    return mock.patch.object(cpu, "check_cpu_sgl_kernel", return_value=False)


def _with_one_shard(policies: Policies, path: Path) -> Path:
    """Policy A with the one shard of B: what pushing it asks for, taken by its word."""
    shard = {_LONE_SHARD: policies.tensors("b")[_LONE_SHARD]}
    return arms.write_like(policies.bf16("a"), path, policies.tensors("a") | shard)


def _judge(situation: Situation, arm: str, engines: list[Any]) -> Row:
    config = situation.config if arm == FLASHQUANT else None
    with situation.kernels():
        fresh, live = (arms.start(path, config) for path in (situation.new, situation.old))
        engines += fresh, live
        expected, old = arms.outputs(fresh), arms.outputs(live)
        arms.check_distinct(situation.name, expected, old)
        error = arms.push(live, situation.push.items())
        served = arms.outputs(live)
    return Row(
        situation=situation.name,
        equals_fresh=served == expected,
        equals_old=served == old,
        gap=served.gap(expected),
        error=error,
    )


def _private_stdout() -> TextIO:
    """The pipe for ourselves alone: what vLLM or a C++ library prints goes to stderr."""
    private = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)
    return private


def main(argv: list[str] | None = None) -> int:
    """Print the table, or the rows of one arm."""
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.beside_vllm",
        description="vLLM's own weight reload beside flashquant, where vLLM's is silently wrong",
    )
    parser.add_argument("--arm", choices=ARMS, help="only this one")
    parser.add_argument("--json", action="store_true", help="that arm in this process, as JSON")
    arguments = parser.parse_args(argv)
    if arguments.json and arguments.arm is None:
        parser.error("--json needs --arm")
    if arguments.arm is None:
        print(arms.table(TITLES, rows()))
    elif arguments.json:
        stdout = _private_stdout()
        json.dump([asdict(row) for row in answer(arguments.arm)], stdout)
        stdout.close()
    else:
        for row in run(arguments.arm):
            print(f"{row.situation}: {row.verdict}")
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
