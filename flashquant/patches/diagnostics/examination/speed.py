"""How long quantizing takes, beside the time in which memory could be read and written once."""

from __future__ import annotations

import functools
import statistics
import time
from collections.abc import Callable, Iterator

import torch
from torch import Tensor

from flashquant.patches.diagnostics.doctor import Finding
from flashquant.schemes import fp8_channel, fp8_tensor, fp8_tensor_rows, int8_channel

_ROWS = {"cpu": 2048, "cuda": 8192}
_COLUMNS = 4096
_RUNS = 9
_WORDS = 400  # shown of what a kernel raises
_BYTES_A_WEIGHT = 3  # two are read, one is written
_FP8 = torch.float8_e4m3fn
Quantizers = dict[str, tuple[Callable[[Tensor, Tensor], object], torch.dtype]]


def timings(device: torch.device) -> Iterator[Finding]:
    """Each quantizer on one weight: how many times the copy limit it takes."""
    weight = torch.randn(_ROWS[device.type], _COLUMNS, device=device).bfloat16()
    limit = _copy_limit(weight)
    for name, (quantize, dtype) in _quantizers(device).items():
        codes = torch.empty_like(weight, dtype=dtype)
        try:
            seconds = _median(functools.partial(quantize, weight, codes), device)
        except Exception as failure:  # whatever a compiler or a device raises
            said = " ".join(str(failure).split())[:_WORDS]
            found = f"{type(failure).__name__}: {said}"
            yield Finding("speed", f"{name} on {device.type}", "fails", found)
            continue
        detail = (
            f"{seconds * 1e3:.3f} ms for {weight.shape[0]} x {weight.shape[1]} bf16, "
            f"{seconds / limit:.1f} times the copy limit of {limit * 1e3:.3f} ms"
        )
        yield Finding("speed", f"{name} on {device.type}", "ok", detail)


def _quantizers(device: torch.device) -> Quantizers:
    found: Quantizers = {
        "int8": (int8_channel, torch.int8),
        "fp8_channel": (fp8_channel, _FP8),
        "fp8_tensor": (fp8_tensor_rows, _FP8),
        "fp8_vllm": (fp8_tensor, _FP8),
    }
    if device.type == "cuda":
        from flashquant.schemes import fused  # Triton comes with torch for CUDA

        found |= {
            "int8 by triton": (fused.int8_channel, torch.int8),
            "fp8_channel by triton": (fused.fp8_channel, _FP8),
        }
    return found


def _copy_limit(weight: Tensor) -> float:
    """Seconds for three bytes a weight, at the rate at which `copy_` moves four."""
    other = torch.empty_like(weight)
    return _median(functools.partial(other.copy_, weight), weight.device) * _BYTES_A_WEIGHT / 4


def _median(run: Callable[[], object], device: torch.device) -> float:
    seconds = []
    for _ in range(_RUNS + 2):
        _wait(device)
        start = time.perf_counter()
        run()
        _wait(device)
        seconds.append(time.perf_counter() - start)
    return statistics.median(seconds[2:])  # the first ones warm up


def _wait(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)
