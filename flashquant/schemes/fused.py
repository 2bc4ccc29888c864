"""The definitions as Triton kernels, for GPUs: each row is read once and written once.

They return the bits of `absmax`, `int8`, `fp8` and `smoothed`, in a launch or three whatever the
size of the weight; how, is in `triton_kernels`. Here they are launched, and compared with their
definitions before they are believed.

Imported only where there is a GPU: Triton is not a dependency.
"""

from __future__ import annotations

import functools
import subprocess
from collections.abc import Callable, Iterator
from typing import Any, Final

import torch
from torch import Tensor
from triton.errors import TritonError

from flashquant.schemes import absmax as maxima
from flashquant.schemes import defaults, devices, fp8, int8, native, smoothed, triton_kernels
from flashquant.schemes.fp8 import FP8
from flashquant.schemes.smoothed import Frozen

# What a kernel raises that cannot be compiled or loaded here: it, ptxas, the C compiler that
# builds its launcher, or the folder in which all of that is kept.
COMPILE_ERRORS: Final = (TritonError, RuntimeError, OSError, subprocess.SubprocessError)
# Columns at a time: a kernel is compiled for each of them. The last one is as much as registers
# hold; a longer row takes several turns of fewer, of which the last one is then not as empty.
BLOCKS: Final = (512, 1024, 2048, 4096, 8192)
_TURNS_OF: Final = 4096
WIDTHS: Final = (*BLOCKS, 2 * BLOCKS[-1])  # a row of each kernel that there is
_FP8_MAX: Final = torch.finfo(FP8).max
_E4M3_SINCE: Final = (8, 9)  # NVIDIA's compute capability: what converts float32 to e4m3 itself
_SHORT: Final = 32  # a program a row is a waste for shorter ones
_ONE_PROGRAM: Final = 1 << 16  # and so many elements are a program's work
_ALIGNED: Final = 16  # bytes: for addresses that are a multiple, Triton compiles other kernels
_ROWS: Final = {"int8_channel": triton_kernels.int8_row, "fp8_channel": triton_kernels.fp8_row}


def row_absmax(weight: Tensor) -> Tensor:
    """`absmax.row_absmax`, for a weight on a GPU with any strides."""
    return _row_absmax(weight, 1.0)


def absmax(tensor: Tensor) -> Tensor:
    """`absmax.absmax`, of a contiguous tensor."""
    if tensor.numel() <= _ONE_PROGRAM:
        return _row_absmax(tensor.view(1, -1), 1.0).view(())
    if tensor.shape[-1] < _SHORT:
        return maxima.absmax(tensor)
    rows = _row_absmax(tensor.view(-1, tensor.shape[-1]), 1.0)
    return _row_absmax(rows.view(1, -1), 1.0).view(())


def int8_channel(weight: Tensor, codes: Tensor | None = None) -> tuple[Tensor, Tensor]:
    """`int8.int8_channel`, for a weight with any strides."""
    return _by_rows(triton_kernels.int8_row, weight, codes, torch.int8)


def fp8_channel(weight: Tensor, codes: Tensor | None = None) -> tuple[Tensor, Tensor]:
    """`fp8.fp8_channel`, likewise."""
    return _by_rows(triton_kernels.fp8_row, weight, codes, FP8)


def bound(name: str, codes: Tensor, scales: Tensor) -> Callable[[Tensor], None]:
    """What makes codes and scales of rows right where they belong, again and again.

    Triton finds out at each launch which of its compiled kernels fits the arguments, which takes
    longer than the launch. Of what is bound, only the address of the rows differs each time.

    Args:
        name: `int8_channel` or `fp8_channel`.
        codes: `[N, K]`, on a GPU, where they belong.
        scales: `[N, 1]`, float32 and contiguous, on the same GPU.

    Returns:
        A function of contiguous rows `[N, K]`, which have one dtype every time.

    """
    kernel, memory = _ROWS[name], codes.view(torch.uint8) if codes.dtype == FP8 else codes
    rows, columns = codes.shape
    others = (memory, scales, columns, columns, 1, *codes.stride())
    constants, options = _constants(kernel, codes), _options(codes)
    compiled: list[Any] = []  # one, of rows whose address is a multiple of what Triton asks for

    def launch(weight: Tensor) -> None:
        is_aligned = weight.data_ptr() % _ALIGNED == 0
        with devices.current(codes.device):
            if compiled and is_aligned:
                compiled[0][rows, 1, 1](weight, *others, *constants.values())
                return
            found = kernel[(rows,)](weight, *others, **constants, **options)
        if is_aligned and found is not None:  # the interpreter compiles nothing
            compiled.append(found)

    return launch


def fp8_tensor(weight: Tensor, codes: Tensor | None = None) -> tuple[Tensor, Tensor]:
    """`fp8.fp8_tensor`, likewise."""
    return fp8_tensors(weight, 1, codes)


def fp8_tensors(weight: Tensor, count: int, codes: Tensor | None = None) -> tuple[Tensor, Tensor]:
    """`fp8.fp8_tensors`, likewise: maxima of rows, scales of those, codes."""
    codes = _destination(weight, codes, FP8)
    peaks = _row_absmax(weight, 1.0).view(count, -1)
    scales = _row_absmax(peaks, _FP8_MAX).view(count)
    return _by_scales(weight, scales, codes), scales


def fp8_static(tensor: Tensor, scale: Tensor, codes: Tensor | None = None) -> Tensor:
    """`fp8.fp8_static`, likewise."""
    if scale.numel() != 1 and tuple(scale.shape) != (tensor.shape[0], 1):
        return fp8.fp8_static(tensor, scale, codes)
    return _by_scales(tensor, scale, _destination(tensor, codes, FP8))


def int8_frozen(
    weight: Tensor,
    input_scale: Tensor | None,
    output_scale: Tensor | None,
    codes: Tensor | None = None,
) -> Frozen:
    """`smoothed.int8_frozen`, likewise."""
    codes = _destination(weight, codes, torch.int8)
    clipped = torch.zeros(weight.shape[0], dtype=torch.int64, device=weight.device)
    peak = torch.zeros(weight.shape[0], dtype=torch.float32, device=weight.device)
    if weight.numel():
        _launch(
            triton_kernels.frozen_row,
            weight,
            codes,
            *_factors(weight, input_scale, output_scale),
            clipped,
            peak,
            *_strides(weight, codes),
            HAS_INPUT=input_scale is not None,
            HAS_OUTPUT=output_scale is not None,
        )
    largest = peak.max() if len(peak) else peak.new_zeros(())
    return Frozen(codes, clipped.sum(), largest / 127)


def int8_refreshed(
    weight: Tensor,
    input_scale: Tensor | None,
    output_scale: Tensor | None,
    weight_scale: Tensor,
    codes: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """`smoothed.int8_refreshed`, likewise."""
    codes = _destination(weight, codes, torch.int8)
    scales = torch.empty((weight.shape[0], 1), dtype=torch.float32, device=weight.device)
    if weight.numel():
        _launch(
            triton_kernels.refreshed_row,
            weight,
            codes,
            *_factors(weight, input_scale, output_scale),
            weight_scale.float().contiguous(),
            scales,
            *_strides(weight, codes),
            HAS_INPUT=input_scale is not None,
            HAS_OUTPUT=output_scale is not None,
        )
    return codes, scales


@functools.cache
@defaults.torchs_own()
def difference(device: torch.device) -> str | None:
    """The first kernel that returns other bits on a device than its definition on the host.

    First loads quantize on the host, and pushes have to return their bits. What is compiled for
    a GPU is believed only after this has returned None there.
    """
    for weight in native.hard_rows():
        for name, ours, defined in _compared(weight, weight.to(device)):
            if not all(map(_same, ours, defined)):
                return f"{name} of {weight.dtype}"
    return None


def _compared(weight: Tensor, there: Tensor) -> Iterator[tuple[str, Any, Any]]:
    """What each kernel makes of a weight on a device, and its definition of that on the host."""
    columns = torch.linspace(0.5, 1.5, weight.shape[1])
    rows = torch.linspace(1, 90, len(weight)) / maxima.row_absmax(weight)[:, 0]
    rows = torch.where(rows.isfinite(), rows, 1.0)
    here = (weight, columns, rows, rows.unsqueeze(1))
    on_it = (there, *(factor.to(there.device) for factor in here[1:]))
    yield "row_absmax", [row_absmax(there)], [maxima.row_absmax(weight)]
    yield "absmax", [absmax(there)], [maxima.absmax(weight)]
    on_host = int8.int8_channel(weight), fp8.fp8_channel(weight)
    yield "int8_channel", int8_channel(there), on_host[0]
    yield "fp8_channel", fp8_channel(there), on_host[1]
    yield "int8_channel, bound", _by_bound("int8_channel", there, torch.int8), on_host[0]
    yield "fp8_channel, bound", _by_bound("fp8_channel", there, FP8), on_host[1]
    # Of all sizes at once most codes would be zeros, so each row is a tensor of its own, too.
    for first, last in ((0, len(weight)), (0, 7), (7, 8), (9, 10), (33, 34)):
        if last <= len(weight):
            made = fp8_tensor(there[first:last]), fp8.fp8_tensor(weight[first:last])
            yield "fp8_tensor", *made
    fit = len(weight) // 3 * 3
    yield "fp8_tensors", fp8_tensors(there[:fit], 3), fp8.fp8_tensors(weight[:fit], 3)
    yield "int8_frozen", int8_frozen(*on_it[:3]), smoothed.int8_frozen(*here[:3])
    yield "int8_refreshed", int8_refreshed(*on_it), smoothed.int8_refreshed(*here)


def _by_bound(name: str, weight: Tensor, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """What is bound to some memory makes there, by the launch that follows the first."""
    codes, scales = _destination(weight, None, dtype), weight.new_empty(len(weight), 1).float()
    store = bound(name, codes, scales)
    store(weight.flip(0).contiguous())
    store(weight.contiguous())
    return codes, scales


def _same(one: Tensor, other: Tensor) -> bool:
    one, other = (tensor.cpu().reshape(-1).view(torch.uint8) for tensor in (one, other))
    return torch.equal(one, other)


def _row_absmax(weight: Tensor, divisor: float) -> Tensor:
    """The absolute maximum of each row, divided: float32 `[N, 1]`."""
    peaks = torch.empty((weight.shape[0], 1), dtype=torch.float32, device=weight.device)
    if weight.shape[0]:
        sizes = (weight.shape[1], *weight.stride())
        _launch(triton_kernels.absmax_row, weight, peaks, *sizes, divisor)
    return peaks


def _by_scales(weight: Tensor, scales: Tensor, codes: Tensor) -> Tensor:
    """Codes under scales that as many rows share as there are for each."""
    shared = (scales.float().contiguous(), weight.shape[0] // scales.numel())
    memory = codes.view(torch.uint8)
    _launch(triton_kernels.static_row, weight, memory, *shared, *_strides(weight, codes))
    return codes


def _by_rows(
    kernel: Any, weight: Tensor, codes: Tensor | None, dtype: torch.dtype
) -> tuple[Tensor, Tensor]:
    codes = _destination(weight, codes, dtype)
    scales = torch.empty((weight.shape[0], 1), dtype=torch.float32, device=weight.device)
    if weight.shape[0]:
        memory = codes.view(torch.uint8) if dtype == FP8 else codes
        _launch(kernel, weight, memory, scales, *_strides(weight, codes))
    return codes, scales


def _launch(kernel: Any, weight: Tensor, *arguments: Any, **constants: Any) -> None:
    """A program for each row, on the device where they lie."""
    with devices.current(weight.device):
        constants |= _constants(kernel, weight)
        kernel[(weight.shape[0],)](weight, *arguments, **constants, **_options(weight))


def _constants(kernel: Any, rows: Tensor) -> dict[str, int | bool]:
    """For which a kernel is compiled anew, in its order: how a row is cut up, what the GPU has."""
    columns = rows.shape[1]
    every = {
        "BLOCK": _block(columns),
        "ONCE": columns <= BLOCKS[-1],
        "HAS_E4M3": _has_e4m3(rows.device),
    }
    return {name: value for name, value in every.items() if name in kernel.arg_names}


@functools.cache
def _has_e4m3(device: torch.device) -> bool:
    """Whether Triton converts float32 to e4m3 by an instruction of this GPU."""
    if device.type != "cuda" or torch.version.cuda is None:
        return False
    return torch.cuda.get_device_capability(device) >= _E4M3_SINCE


def _options(rows: Tensor) -> dict[str, Any]:
    # As measured on an H200 (docs/gpu.md).
    return {"num_warps": 8 if rows.shape[1] > _TURNS_OF else 4, "enable_fp_fusion": False}


def _factors(
    weight: Tensor, input_scale: Tensor | None, output_scale: Tensor | None
) -> Iterator[Tensor]:
    """What the kernels are told of each scale; a pointer that is not followed, without one."""
    for scale in (input_scale, output_scale):
        yield weight if scale is None else scale.float().contiguous()


def _destination(weight: Tensor, codes: Tensor | None, dtype: torch.dtype) -> Tensor:
    if codes is not None:
        return codes
    return torch.empty(weight.shape, dtype=dtype, device=weight.device)


def _strides(weight: Tensor, codes: Tensor) -> tuple[int, ...]:
    return (weight.shape[1], *weight.stride(), *codes.stride())


def _block(columns: int) -> int:
    return next((block for block in BLOCKS if block >= columns), _TURNS_OF)
