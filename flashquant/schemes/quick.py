"""The same functions as their definitions, by the fastest implementation that takes this tensor."""

from __future__ import annotations

import functools
import logging
import math
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from types import ModuleType
from typing import Any, Final, Protocol

import torch
from torch import Tensor
from torch.nn.utils import get_total_norm

from flashquant.schemes import absmax as maxima
from flashquant.schemes import fp8, int8, native, smoothed
from flashquant.schemes.smoothed import Frozen

logger = logging.getLogger(__name__)


# Rows, and where their codes are to be written (None: in new memory), to codes and scales.
class Quantize(Protocol):
    """Floats become codes and scales; the codes where they are wanted, if that is given."""

    def __call__(self, weight: Tensor, codes: Tensor | None = None, /) -> tuple[Tensor, Tensor]: ...


Storing = Callable[[Tensor], float | Tensor]

_CANNOT: Final = (
    "%s cannot be compiled by Triton for %s, so torch quantizes there instead, several times "
    "slower and with the same bits: %s. Triton wants a C compiler (gcc, or what CC names) and a "
    "folder that it can write to (TRITON_CACHE_DIR)."
)
_abandoned: set[torch.device] = set()  # GPUs for which a kernel could not be compiled

# One thread reads so many faster than others are woken.
_FEW: Final = 1 << 17


def row_absmax(weight: Tensor) -> Tensor:
    """`absmax.row_absmax`."""
    made: Tensor = _run("row_absmax", maxima, weight)
    return made


def absmax(tensor: Tensor) -> Tensor:
    """`absmax.absmax`."""
    if tensor.numel() and tensor.is_contiguous():
        rows = tensor.view(-1, tensor.shape[-1]) if tensor.dim() else tensor.view(1, 1)
        if _is_on_gpu(rows):
            if _keeps_nan(rows.device):
                return _norm(tensor)
            made: Tensor = _run("absmax", maxima, rows)
            return made
        if (kernels := _kernels(rows)) is not None:
            return kernels.row_absmax(rows).max()
    return maxima.absmax(tensor)


def peak(tensor: Tensor) -> float:
    """The absolute maximum of all elements as a Python number; it is waited for."""
    if tensor.numel() < _FEW and tensor.is_contiguous() and tensor.device.type == "cpu":
        kernels = _kernels(tensor.view(1, -1))
        if kernels is not None:
            return kernels.peak(tensor)
    return absmax(tensor).item()


def largest(tensors: Sequence[Tensor]) -> float:
    """The absolute maximum of all elements of floats on one device, which is waited for once.

    On a GPU a handful of launches look at hundreds of tensors.

    Args:
        tensors: of any shapes, of dtypes of more than one byte.

    """
    if _keeps_nans(tensors[0].device):
        return get_total_norm(tensors, math.inf).item()
    return torch.stack([absmax(tensor).float() for tensor in tensors]).max().item()


@functools.cache
def _keeps_nans(device: torch.device) -> bool:
    """Whether torch's norm of many tensors is NaN if any element of them is, here."""
    return all(math.isnan(get_total_norm(ts, math.inf).item()) for ts in _with_a_nan(device))


@functools.cache
def _keeps_nan(device: torch.device) -> bool:
    """Whether torch's norm of one tensor is."""
    return all(math.isnan(_norm(tensor).item()) for _, tensor in _with_a_nan(device))


def _with_a_nan(device: torch.device) -> Iterator[list[Tensor]]:
    for place in (0, 40_000, 99_999):
        tensors = [torch.ones(size, dtype=torch.float32, device=device) for size in (7, 100_000)]
        tensors[1][place] = math.nan
        yield tensors


def _norm(tensor: Tensor) -> Tensor:
    """The absolute maximum, by one launch of torch's; a row at a time takes Triton two, and Python
    longer than the GPU."""
    norm: Tensor = torch.linalg.vector_norm(tensor, math.inf, dtype=torch.float32)
    return norm


def int8_channel(weight: Tensor, codes: Tensor | None = None) -> tuple[Tensor, Tensor]:
    """`int8.int8_channel`."""
    made: tuple[Tensor, Tensor] = _run("int8_channel", int8, weight, codes)
    return made


def fp8_channel(weight: Tensor, codes: Tensor | None = None) -> tuple[Tensor, Tensor]:
    """`fp8.fp8_channel`."""
    made: tuple[Tensor, Tensor] = _run("fp8_channel", fp8, weight, codes)
    return made


def fp8_tensor(weight: Tensor, codes: Tensor | None = None) -> tuple[Tensor, Tensor]:
    """`fp8.fp8_tensor`."""
    if _is_on_gpu(weight) and weight.is_contiguous() and _keeps_nan(weight.device):
        scale = fp8.tensor_scale(_norm(weight))
        return fp8_static(weight, scale, codes), scale
    made: tuple[Tensor, Tensor] = _run("fp8_tensor", fp8, weight, codes)
    return made


def fp8_tensor_rows(weight: Tensor, codes: Tensor | None = None) -> tuple[Tensor, Tensor]:
    """`fp8.fp8_tensor_rows`."""
    made, scale = fp8_tensor(weight, codes)
    return made, fp8.filled(scale, weight)


def fp8_tensors(weight: Tensor, count: int, codes: Tensor | None = None) -> tuple[Tensor, Tensor]:
    """`fp8.fp8_tensors`."""
    if _is_on_gpu(weight):
        made: tuple[Tensor, Tensor] = _run("fp8_tensors", fp8, weight, count, codes)
        return made
    if codes is None:
        codes = torch.empty(weight.shape, dtype=fp8.FP8, device=weight.device)
    parts = zip(weight.tensor_split(count), codes.tensor_split(count), strict=True)
    return codes, torch.cat([fp8_tensor(one, into)[1] for one, into in parts])


def fp8_static(tensor: Tensor, scale: Tensor, codes: Tensor | None = None) -> Tensor:
    """`fp8.fp8_static`."""
    made: Tensor = _run("fp8_static", fp8, tensor, scale, codes)
    return made


def int8_frozen(
    weight: Tensor,
    input_scale: Tensor | None,
    output_scale: Tensor | None,
    codes: Tensor | None = None,
) -> Frozen:
    """`smoothed.int8_frozen`."""
    made: Frozen = _run("int8_frozen", smoothed, weight, input_scale, output_scale, codes)
    return made


def int8_refreshed(
    weight: Tensor,
    input_scale: Tensor | None,
    output_scale: Tensor | None,
    weight_scale: Tensor,
    codes: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """`smoothed.int8_refreshed`."""
    scales = (input_scale, output_scale, weight_scale)
    made: tuple[Tensor, Tensor] = _run("int8_refreshed", smoothed, weight, *scales, codes)
    return made


def warm(runs: Iterable[Callable[[Tensor], object]], dtype: torch.dtype, on: torch.device) -> None:
    """Compile what pushes will launch on a GPU, so that none of them has to wait for it.

    Args:
        runs: whatever will be done with rows `[N, K]`; once for each width that has a kernel of
            its own.
        dtype: of the rows that will come.
        on: where they will lie. For the host, nothing is compiled.

    """
    if on.type != "cuda" or (fused := _on_gpu(on)) is None:
        return
    start = time.perf_counter()
    absmax(torch.zeros(1, 1, dtype=torch.float32, device=on))  # of the scale of a tensor
    for columns in fused.WIDTHS:
        for stored in (dtype, torch.float32):  # of what is not quantized, and of scales
            absmax(torch.zeros(1, columns, dtype=stored, device=on))
        for run in runs:
            run(torch.zeros(2, columns, dtype=dtype, device=on))
    logger.info("kernels for %s are compiled (%.1f s)", on, time.perf_counter() - start)


_IN_C: Final[dict[Quantize | None, str]] = {
    None: "copied",
    int8_channel: "int8_channel",
    fp8_channel: "fp8_channel",
}


def storing(
    quantize: Quantize | None, dtype: torch.dtype, home: Tensor, scales: Tensor | None = None
) -> Storing:
    """What stores contiguous rows right where they belong, as they are or as codes and scales.

    Args:
        quantize: to one scale a row; None where they are stored as they are.
        dtype: of the rows that will come.
        home: `[N, K]`, codes, or `dtype`.
        scales: `[N, 1]`, float32 and contiguous, beside codes.

    Returns:
        A function of the rows, that returns their absolute maximum, or something else that is
        finite if that is; where a device would have to be waited for, a tensor of such numbers,
        which may be what was stored.

    """
    kernels = native.kernels() if home.device.type == "cpu" and dtype in native.TYPES else None
    if kernels is not None and quantize in _IN_C:
        return kernels.storing(_IN_C[quantize], dtype, home, scales)

    def store(weight: Tensor) -> float | Tensor:
        if quantize is None or scales is None:
            told = home.copy_(weight)
        else:
            _, told = quantize(weight, home)
            scales.copy_(told)
        return told if home.device.type != "cpu" else absmax(told).item()

    if scales is not None and quantize in _IN_C and _is_on_gpu(home):
        return _launching(_IN_C[quantize], home, scales, store)
    return store


def _launching(name: str, home: Tensor, scales: Tensor, otherwise: Storing) -> Storing:
    """The same by one launch, in which nothing is asked that is known by now."""
    fused = _on_gpu(home.device)
    if fused is None:
        return otherwise
    launch = fused.bound(name, home, scales)

    def store(weight: Tensor) -> float | Tensor:
        if home.device in _abandoned:
            return otherwise(weight)
        try:
            launch(weight)
        except torch.OutOfMemoryError:
            raise
        except fused.COMPILE_ERRORS as failure:
            _without(home.device, name, failure)
            return otherwise(weight)
        return scales

    return store


def _kernels(weight: Tensor) -> native.Kernels | None:
    """Those that take this tensor: it has memory, and no dispatch mode watches it."""
    plain = type(weight).__torch_dispatch__ is Tensor.__torch_dispatch__
    if not plain or not native.Kernels.take(weight) or torch.compiler.is_compiling():
        return None
    return native.kernels()


def _run(name: str, definition: ModuleType, weight: Tensor, *arguments: Any) -> Any:
    """One function of these rows: by Triton on a GPU, by C on the host, or as it is defined."""
    if _is_on_gpu(weight) and (fused := _on_gpu(weight.device)) is not None:
        try:
            return getattr(fused, name)(weight, *arguments)
        except torch.OutOfMemoryError:
            raise
        except fused.COMPILE_ERRORS as failure:
            _without(weight.device, name, failure)
    return getattr(_kernels(weight) or definition, name)(weight, *arguments)


def _without(device: torch.device, name: str, failure: Exception) -> None:
    """Let torch do the work on a GPU from now on."""
    logger.error(_CANNOT, name, device, failure)
    _abandoned.add(device)
    _on_gpu.cache_clear()


def _is_on_gpu(weight: Tensor) -> bool:
    """Whether it has rows that Triton's kernels could read."""
    there = weight.device.type == "cuda" and weight.numel() > 0 and weight.dim() == 2
    return there and not torch.compiler.is_compiling()


@functools.cache
def _on_gpu(device: torch.device) -> Any:
    """The Triton kernels, if they return the bits of the definitions on this device."""
    if not native.wanted() or device in _abandoned:
        return None
    try:
        from flashquant.schemes import fused
    except ImportError as missing:  # Triton comes with torch for CUDA
        logger.info("rows on %s are quantized by torch: %s", device, missing)
        return None
    try:
        strange = fused.difference(device)
    except fused.COMPILE_ERRORS as failure:
        logger.error(_CANNOT, "a kernel", device, failure)
        return None
    if strange is None:
        return fused
    logger.error(
        "%s, compiled for %s, differs from its definition, so torch quantizes instead. Please "
        "report it with the output of `flashquant doctor`.",
        strange,
        torch.cuda.get_device_name(device),
    )
    return None
