"""Rows of bf16 into codes on a GPU: how near to the copy limit?

As `benchmarks.quantize`, which times the CPU: the limit is the time to move three bytes a weight
at the bandwidth that `copy_` of the same tensor reaches. Everything takes turns; CUDA's own clock.
Experts `[E, N, K]` are quantized one by one, as a reload does it.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from pathlib import Path
from statistics import median

import torch
from torch import Tensor

from benchmarks import environment, quantize
from benchmarks.gpu.facts import Facts
from benchmarks.quantize import COPY, Row, Work

SHAPES = ("4096x4096", "4096x11008", "8192x8192", "128x768x2048")
SMALL = ("256x384", "8x128x256")
_WARM_UP = 3
_BLOCK = [128, 128]


def measure(shapes: tuple[str, ...], device: torch.device, rounds: int, facts: Facts) -> list[Row]:
    """Everybody in turn, shape by shape."""
    environment.prepare()
    found = []
    for shape in shapes:
        rows = one(shape, device, rounds, facts)
        limit = rows[0].limit
        said = ", ".join(f"{row.scheme} by {row.by} {row.ratio:.2f}" for row in rows)
        facts.tell(shape, f"copy limit {limit * 1e6:.0f} us; of it: {said}")
        found += rows
    return found


def one(shape: str, device: torch.device, rounds: int, facts: Facts) -> list[Row]:
    """One shape; what fails is told, and left out."""
    weight = torch.randn([int(part) for part in shape.split("x")], device=device).bfloat16()
    work: dict[tuple[str, str], Work] = {(COPY, "torch"): quantize.copy(weight)}
    work |= by_rows(weight) if weight.dim() == 2 else by_experts(weight)
    work |= vllms(weight if weight.dim() == 2 else weight.flatten(0, 1), weight.shape)
    clock, taken = clock_of(device), {key: [] for key in work}
    for _ in range(rounds + _WARM_UP):
        for key in list(work):
            seconds = facts.guarded(f"{shape}, {' by '.join(key)}", lambda k=key: clock(work[k]))
            if seconds is None:
                del work[key], taken[key]
            else:
                taken[key].append(seconds)
    limit = median(taken[COPY, "torch"][_WARM_UP:]) * 3 / 4
    return [Row(shape, *key, seconds[_WARM_UP:], limit) for key, seconds in taken.items()]


def by_rows(weight: Tensor) -> dict[tuple[str, str], Work]:
    """What a reload calls, and the definitions."""
    return dict(quantize.contenders(weight))


def by_experts(weight: Tensor) -> dict[tuple[str, str], Work]:
    """What a reload calls, expert by expert; definitions would take as many launches again."""
    each = [
        {
            scheme: call
            for (scheme, by), call in quantize.contenders(expert).items()
            if by == "quick"
        }
        for expert in weight
    ]
    return {(scheme, "quick"): _all([calls[scheme] for calls in each]) for scheme in each[0]}


def _all(calls: list[Work]) -> Work:
    def work() -> None:
        for call in calls:
            call()

    return work


def vllms(rows: Tensor, shape: torch.Size) -> dict[tuple[str, str], Work]:
    """vLLM's own kernels, where this build has them; each makes its own codes."""
    if rows.device.type != "cuda":
        found = {}
    else:
        from vllm import _custom_ops as ops

        found = {
            ("int8_channel", "vLLM"): lambda: ops.scaled_int8_quant(rows),
            ("fp8_channel", "vLLM"): lambda: ops.scaled_fp8_quant(
                rows, use_per_token_if_dynamic=True
            ),
        }
        if len(shape) == 2:
            found["fp8_tensor", "vLLM"] = lambda: ops.scaled_fp8_quant(rows)
    return found | {("fp8_block", "vLLM"): lambda: blocks(rows)}


def blocks(rows: Tensor) -> object:
    """What vLLM's online load, and so a reload of ours, does with blocks of 128 x 128."""
    from vllm.utils.deep_gemm import per_block_cast_to_fp8

    return per_block_cast_to_fp8(rows, block_size=_BLOCK, use_ue8m0=False)


def clock_of(device: torch.device) -> Callable[[Work], float]:
    """Seconds of a call: by events in the stream on a GPU, where a call returns at once."""
    return _by_events if device.type == "cuda" else _by_the_wall


def _by_the_wall(call: Work) -> float:
    began = time.perf_counter()
    call()
    return time.perf_counter() - began


def _by_events(call: Work) -> float:
    begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    torch.cuda.synchronize()
    begin.record()
    call()
    end.record()
    end.synchronize()
    return begin.elapsed_time(end) / 1e3


def run(device: torch.device, rounds: int, facts: Facts, out: Path, *, small: bool) -> None:
    """Measure, tell, keep."""
    rows = measure(SMALL if small else SHAPES, device, rounds, facts)
    flat = [row for row in rows if row.shape.count("x") == 1]
    experts = [row for row in rows if row.shape.count("x") == 2]
    tables = "\n\n".join(quantize.table(part) for part in (flat, experts) if part)
    facts.keep(rows, tables, out)
