"""The definitions' equals in C, for rows that lie in host memory.

`rows.c` is built by the machine's own C compiler when it is first wanted (about a second),
kept in the user's cache, and believed only after it has returned the bits of the definitions.
Where there is no compiler, or anything about it is odd, the definitions do the work: slower,
and the same bits. `FLASHQUANT_NATIVE=0` asks for that.

Limits
    1. bf16 and fp32, elements of a row side by side. The rest is the definitions' business.
"""

from __future__ import annotations

import ctypes
import functools
import logging
import os
from collections.abc import Callable, Iterator
from typing import Any, Final

import torch
from torch import Tensor

from flashquant.config import env
from flashquant.schemes import absmax, defaults, fp8, int8, smoothed
from flashquant.schemes.build import BuildError, built
from flashquant.schemes.smoothed import Frozen

logger = logging.getLogger(__name__)

TYPES: Final = {torch.bfloat16: "bf16", torch.float32: "f32"}
_POINTER, _SIZE, _FLOAT = ctypes.c_void_p, ctypes.c_int64, ctypes.c_float
_WEIGHT, _CODES, _SHAPE = [_POINTER, _SIZE], [_POINTER, _SIZE], [_SIZE, _SIZE]
_SIGNATURES: Final[dict[str, list[Any]]] = {
    "absmax": [*_WEIGHT, _POINTER, *_SHAPE],
    "copied": [*_WEIGHT, *_CODES, *_SHAPE],
    "int8_channel": [*_WEIGHT, *_CODES, _POINTER, *_SHAPE],
    "fp8_channel": [*_WEIGHT, *_CODES, _POINTER, _FLOAT, *_SHAPE],
    "fp8_static": [*_WEIGHT, *_CODES, _POINTER, _SIZE, *_SHAPE],
    "int8_refreshed": [*_WEIGHT, *_CODES, *[_POINTER] * 4, *_SHAPE],
    "int8_frozen": [*_WEIGHT, *_CODES, *[_POINTER] * 2, _FLOAT, *[_POINTER] * 2, *_SHAPE],
}
_HOST: Final[dict[str, Any]] = {"device": "cpu", "dtype": torch.float32}
_RETURN_THE_PEAK: Final = ("copied", "int8_channel", "fp8_channel")


class Kernels:
    """The functions of `absmax`, `int8`, `fp8` and `smoothed` that read a matrix, in C.

    Each takes what its definition takes and returns the same bits. `codes` are written where
    they are wanted, if that is given: `[N, K]`, rows at any distance from each other.
    """

    def __init__(self, library: ctypes.CDLL) -> None:
        """Raises AttributeError where a kernel is missing."""
        self._library = library
        for name, arguments in _SIGNATURES.items():
            for suffix in TYPES.values():
                kernel = getattr(library, f"{name}_{suffix}")
                kernel.argtypes = arguments
                kernel.restype = _FLOAT if name in _RETURN_THE_PEAK else None
        for suffix in TYPES.values():
            peak = getattr(library, f"peak_of_{suffix}")
            peak.argtypes, peak.restype = [_POINTER, _SIZE], _FLOAT

    @staticmethod
    def take(weight: Tensor) -> bool:
        """Whether these rows are within the limits."""
        return (
            weight.dtype in TYPES
            and weight.device.type == "cpu"
            and weight.dim() == 2
            and (weight.stride(1) == 1 or weight.shape[1] <= 1)
        )

    def peak(self, tensor: Tensor) -> float:
        """The absolute maximum of a contiguous tensor of few elements, without a tensor made."""
        peak: float = getattr(self._library, f"peak_of_{TYPES[tensor.dtype]}")(
            tensor.data_ptr(), tensor.numel()
        )
        return peak

    def row_absmax(self, weight: Tensor) -> Tensor:
        maxima = _scales(weight)
        self._call("absmax", weight, maxima.data_ptr())
        return maxima

    def int8_channel(self, weight: Tensor, codes: Tensor | None = None) -> tuple[Tensor, Tensor]:
        codes, scales = _codes(weight, codes, torch.int8), _scales(weight)
        self._call("int8_channel", weight, *_place(codes), scales.data_ptr())
        return codes, scales

    def fp8_channel(self, weight: Tensor, codes: Tensor | None = None) -> tuple[Tensor, Tensor]:
        codes, scales = _codes(weight, codes, fp8.FP8), _scales(weight)
        least = fp8.SMALLEST_CHANNEL_SCALE
        self._call("fp8_channel", weight, *_place(codes), scales.data_ptr(), least)
        return codes, scales

    def fp8_tensor(self, weight: Tensor, codes: Tensor | None = None) -> tuple[Tensor, Tensor]:
        peak = self.row_absmax(weight).max() if weight.numel() else torch.zeros((), **_HOST)
        scale = fp8.tensor_scale(peak)
        return self.fp8_static(weight, scale, codes), scale

    def fp8_static(self, tensor: Tensor, scale: Tensor, codes: Tensor | None = None) -> Tensor:
        codes = _codes(tensor, codes, fp8.FP8)
        inverse = fp8.reciprocal(scale).contiguous()
        if inverse.numel() not in (1, tensor.shape[0]):
            return fp8.fp8_static(tensor, scale, codes)
        step = int(inverse.numel() > 1)
        self._call("fp8_static", tensor, *_place(codes), inverse.data_ptr(), step)
        return codes

    def int8_frozen(
        self,
        weight: Tensor,
        input_scale: Tensor | None,
        output_scale: Tensor | None,
        codes: Tensor | None = None,
    ) -> Frozen:
        codes = _codes(weight, codes, torch.int8)
        rows, columns = _factors(weight, output_scale, 0), _factors(weight, input_scale, 1)
        peaks = _scales(weight)
        clipped = torch.empty(weight.shape[0], dtype=torch.int64, device="cpu")
        factors = (rows.data_ptr(), columns.data_ptr(), smoothed.HELD)
        told = (peaks.data_ptr(), clipped.data_ptr())
        self._call("int8_frozen", weight, *_place(codes), *factors, *told)
        peak = peaks.max() if len(peaks) else torch.zeros((), **_HOST)
        return Frozen(codes, clipped.sum(), peak / 127)

    def int8_refreshed(
        self,
        weight: Tensor,
        input_scale: Tensor | None,
        output_scale: Tensor | None,
        weight_scale: Tensor,
        codes: Tensor | None = None,
    ) -> tuple[Tensor, Tensor]:
        codes, scales = _codes(weight, codes, torch.int8), _scales(weight)
        rows, columns = _factors(weight, output_scale, 0), _factors(weight, input_scale, 1)
        known = weight_scale.float().contiguous()
        factors = (rows.data_ptr(), columns.data_ptr(), known.data_ptr())
        self._call("int8_refreshed", weight, *_place(codes), *factors, scales.data_ptr())
        return codes, scales

    def storing(
        self, name: str, dtype: torch.dtype, home: Tensor, scales: Tensor | None = None
    ) -> Callable[[Tensor], float]:
        """One of `copied`, `int8_channel` and `fp8_channel`, bound to where its results belong.

        It takes contiguous rows, and returns the absolute maximum of all of them.

        Args:
            name: which.
            dtype: of the rows that will come, which are as many and as long as those of `home`.
            home: `[N, K]`, rows at any distance from each other. The caller keeps it, and sees to
                it that it stays where it is.
            scales: `[N, 1]`, float32 and contiguous, likewise; of what makes some.

        """
        kernel = getattr(self._library, f"{name}_{TYPES[dtype]}")
        rows, columns = home.shape
        places = (*_place(home), *(() if scales is None else (scales.data_ptr(),)))
        least = (fp8.SMALLEST_CHANNEL_SCALE,) if name == "fp8_channel" else ()
        last = (*places, *least, rows, columns)

        def store(weight: Tensor) -> float:
            peak: float = kernel(weight.data_ptr(), columns, *last)
            return peak

        return store

    def _call(self, name: str, weight: Tensor, *arguments: Any) -> None:
        kernel = getattr(self._library, f"{name}_{TYPES[weight.dtype]}")
        kernel(weight.data_ptr(), weight.stride(0), *arguments, *weight.shape)


def wanted() -> bool:
    """Whether FLASHQUANT_NATIVE leaves the work to kernels, as it does unless it says no."""
    return env.NATIVE.read(os.environ)


@functools.cache
def kernels() -> Kernels | None:
    """The kernels of this machine, built and believed; None where there are none."""
    if not wanted():
        return None
    try:
        found = Kernels(ctypes.CDLL(str(built())))
    except (BuildError, OSError, AttributeError) as reason:
        logger.info("rows are quantized by torch, several times slower than in C: %s", reason)
        return None
    if (strange := difference(found)) is None:
        return found
    logger.error(
        "%s, built by this machine's C compiler, differs from its definition, so torch quantizes "
        "instead. Please report the compiler and the CPU.",
        strange,
    )
    return None


@defaults.torchs_own()
def difference(found: Kernels) -> str | None:
    """The first kernel that returns other bits than its definition, by name."""
    for weight in hard_rows():
        dice = torch.Generator().manual_seed(1)
        columns = torch.rand(weight.shape[1], generator=dice, **_HOST) + 0.5
        rows = 150 * torch.rand(len(weight), generator=dice, **_HOST)
        rows = rows / absmax.row_absmax(weight).flatten()
        rows = torch.where(rows.isfinite(), rows, 1.0)
        compared: dict[str, tuple[Callable[..., Any], Callable[..., Any], tuple[Tensor, ...]]] = {
            "absmax": (found.row_absmax, absmax.row_absmax, ()),
            "int8_channel": (found.int8_channel, int8.int8_channel, ()),
            "fp8_channel": (found.fp8_channel, fp8.fp8_channel, ()),
            "fp8_tensor": (found.fp8_tensor, fp8.fp8_tensor, ()),
            "int8_frozen": (found.int8_frozen, smoothed.int8_frozen, (columns, rows)),
            "int8_refreshed": (
                found.int8_refreshed,
                smoothed.int8_refreshed,
                (columns, rows, rows.unsqueeze(1)),
            ),
        }
        for name, (ours, defined, factors) in compared.items():
            if not _same(ours(weight, *factors), defined(weight, *factors)):
                return f"{name} of {weight.dtype}"
        for name in _RETURN_THE_PEAK:
            if not _same_in_place(found, name, weight):
                return f"{name} of {weight.dtype}, in place"
    return None


def _same_in_place(found: Kernels, name: str, weight: Tensor) -> bool:
    """Whether a kernel stores, and returns, what the definitions say."""
    if name == "copied":
        defined: tuple[Tensor, ...] = (weight,)
    else:
        defined = (int8 if name == "int8_channel" else fp8).__dict__[name](weight)
    made = [torch.empty_like(tensor) for tensor in defined]
    peak = found.storing(name, weight.dtype, *made)(weight)
    return _same(tuple(made), defined) and peak == absmax.absmax(weight).item()


def _codes(weight: Tensor, codes: Tensor | None, dtype: torch.dtype) -> Tensor:
    return torch.empty(weight.shape, dtype=dtype, device="cpu") if codes is None else codes


def _place(codes: Tensor) -> tuple[int, int]:
    """Where the codes go: their address, and the distance between two rows."""
    if codes.stride(1) != 1 and codes.shape[1] > 1:
        raise ValueError(f"codes of stride {codes.stride()} are not rows side by side")
    return codes.data_ptr(), codes.stride(0)


def _scales(weight: Tensor) -> Tensor:
    return torch.empty((weight.shape[0], 1), dtype=torch.float32, device="cpu")


def _factors(weight: Tensor, scale: Tensor | None, dim: int) -> Tensor:
    """A float32 factor a row or a column; times one is exact."""
    if scale is None:
        return torch.ones(weight.shape[dim], dtype=torch.float32, device="cpu")
    return scale.float().contiguous()


def hard_rows() -> Iterator[Tensor]:
    """Rows of very different sizes, zeros and ties among them; their length fits no lanes.

    On the host and of float32, whatever torch's defaults are: a generator of the host fills no
    other device, and vLLM makes bf16 the default while it loads a model.
    """
    dice = torch.Generator().manual_seed(0)
    weight = torch.randn(67, 339, generator=dice, **_HOST)
    weight *= torch.logspace(-30, 30, 67, **_HOST)[:, None]
    weight[7] = 0
    weight[8] = torch.arange(339, **_HOST) - 169.5
    weight[9, 1:] *= torch.logspace(-9, 0, 338, **_HOST)  # codes of all sizes in one row
    yield weight
    yield weight.bfloat16()
    yield weight[:8] * 1e-15  # below what has a reciprocal
    yield (weight[:8] * 1e-15).bfloat16()


def _same(ours: Any, defined: Any) -> bool:
    some, others = ((x,) if isinstance(x, Tensor) else x for x in (ours, defined))
    return all(
        one.shape == other.shape
        and torch.equal(one.reshape(-1).view(torch.uint8), other.reshape(-1).view(torch.uint8))
        for one, other in zip(some, others, strict=True)
    )
