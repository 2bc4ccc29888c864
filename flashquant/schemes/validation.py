"""Refuse a tensor before anything is touched: shape, place, dtype, values."""

from __future__ import annotations

import math
from collections.abc import Iterable

import torch
from torch import Tensor

from flashquant.errors import MisfitTensor
from flashquant.schemes.quick import absmax, largest
from flashquant.schemes.quick import peak as peak_of

# What a trainer may send; each is quantized from its own precision.
_SENT = (torch.bfloat16, torch.float16, torch.float32)


def check_plain(name: str, value: object) -> None:
    """An ordinary tensor: neither another library's array, nor sharded, nor sparse, nor freed."""
    if not isinstance(value, Tensor):
        raise MisfitTensor(f"{name} is a {type(value).__name__}; send a torch.Tensor")
    if hasattr(value, "full_tensor"):
        raise MisfitTensor(
            f"{name} is a sharded {type(value).__name__}; send what its full_tensor() returns"
        )
    if value.layout is not torch.strided:
        raise MisfitTensor(f"{name} is laid out as {value.layout}; send a dense tensor")
    if value.numel() and not value.untyped_storage().nbytes():
        raise MisfitTensor(
            f"{name} holds no values: its memory has been given back, as FSDP does between two "
            "steps. Gather the weights (summon_full_params, unshard), and push them before that "
            "ends."
        )


def in_ordinary_memory(tensor: Tensor) -> Tensor:
    """The same values where they can be read by address: of a tensor that another library wraps,
    and has somewhere in there; of a view that only says that its memory is negated."""
    if type(tensor).__torch_dispatch__ is Tensor.__torch_dispatch__:
        return tensor.resolve_neg()
    with torch.no_grad():
        return torch.empty(tensor.shape, dtype=tensor.dtype, device=tensor.device).copy_(tensor)


def check_form(name: str, tensor: Tensor, shape: tuple[int, ...]) -> None:
    """The whole, unsharded tensor, with values in it."""
    if tuple(tensor.shape) != shape:
        raise MisfitTensor(
            f"{name} has shape {tuple(tensor.shape)}, but should have {shape}. "
            "Send the whole, unsharded tensor of the model the engine was started on."
        )
    if tensor.is_meta:
        raise MisfitTensor(f"{name} is on the meta device; send a tensor that holds values")


def check_dtype(name: str, sent: torch.dtype, stored: torch.dtype) -> None:
    """Floats go anywhere; codes only into parameters of their own dtype."""
    if sent == stored or sent in _SENT:
        return
    raise MisfitTensor(
        f"{name} is {sent}, but the engine stores {stored}. "
        f"Send bfloat16, float16 or float32, or {stored} codes with their scales."
    )


class Doubts:
    """Tensors on a device that is not waited for until an update is to stand.

    A value that is not finite is then found at the end of its push, or of its bracket, and taken
    back with everything else. On the host nothing is gained by waiting, so there nothing waits.
    """

    def __init__(self) -> None:
        self._open: list[tuple[str, Tensor, tuple[torch.dtype, ...]]] = []

    def add(self, name: str, values: Tensor, stored: Iterable[torch.dtype]) -> None:
        """Take note of a tensor, or of something that is finite if it is.

        Args:
            name: of the tensor, for the error.
            values: floats of more than one byte, which hold then what they hold now: no buffer of
                the trainer's, which is filled anew.
            stored: the dtypes that its values will have.

        """
        self._open.append((name, values, tuple(stored)))

    def resolve(self) -> None:
        """Wait once for each device, and look at all of them.

        Raises:
            MisfitTensor: one is not finite, or not once stored.

        """
        doubts, self._open = self._open, []
        for device in {values.device for _, values, _ in doubts}:
            here = [doubt for doubt in doubts if doubt[1].device == device]
            top = largest([values for _, values, _ in here])
            if not _stands(top, {dtype for _, _, stored in here for dtype in stored}):
                for name, values, stored in here:
                    check_peak(name, peak_of(values), stored)


def check_finite(
    name: str, tensor: Tensor, stored: Iterable[torch.dtype] = (), doubts: Doubts | None = None
) -> None:
    """One pass: the absolute maximum tells whether every value is finite, and stays so stored.

    Args:
        name: of the tensor, for the error.
        tensor: any; only floats can be wrong.
        stored: the dtypes that its values will have.
        doubts: takes what would have to be waited for.

    Raises:
        MisfitTensor: it holds NaN or Inf, or values beyond a dtype.

    """
    if not tensor.is_floating_point():
        return
    codes = tensor.element_size() == 1  # torch has no maximum of float8, and e4m3 no infinity
    if doubts is not None and not is_at_hand(tensor):
        peak = torch.where(_holds_nan(tensor), math.nan, 0.0) if codes else absmax(tensor)
        doubts.add(name, peak, stored)
    elif codes:
        check_peak(name, math.nan if _holds_nan(tensor) else 0.0, stored)
    else:
        check_peak(name, peak_of(tensor), stored)


def _holds_nan(codes: Tensor) -> Tensor:
    """Whether any of these float8 is NaN."""
    if codes.dtype != torch.float8_e4m3fn:
        return codes.isnan().any()
    # All bits but the sign: torch's own look at float8 takes thirty times as long on the host.
    return ((codes.view(torch.uint8) & 0x7F) == 0x7F).any()


def is_at_hand(tensor: Tensor) -> bool:
    """Whether its values can be looked at without waiting for a device."""
    return tensor.device.type == "cpu"


def check_peak(name: str, peak: float, stored: Iterable[torch.dtype]) -> None:
    """The absolute maximum of a tensor tells whether every value is finite, and stays so stored.

    Raises:
        MisfitTensor: it is not, or beyond a dtype.

    """
    if _stands(peak, stored):
        return
    if not math.isfinite(peak):
        raise MisfitTensor(
            f"{name} holds NaN or infinite values. Look at the trainer's last step; "
            "the engine still serves the weights it had."
        )
    dtype = next(dtype for dtype in stored if not _stands(peak, [dtype]))
    raise MisfitTensor(
        f"{name} holds values up to {peak:.3g}, beyond what {dtype} can store "
        f"({torch.finfo(dtype).max:.3g}). Serve the engine in bfloat16."
    )


def _stands(peak: float, stored: Iterable[torch.dtype]) -> bool:
    """Whether values up to this one are finite, and stay so in each of these dtypes."""
    limits = (torch.finfo(dtype).max for dtype in stored if dtype.is_floating_point)
    return math.isfinite(peak) and all(peak <= limit for limit in limits)
