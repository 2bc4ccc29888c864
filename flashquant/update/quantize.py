"""A trainer's tensor becomes what the engine's checkpoint-format parameters hold.

    q_proj.weight bf16  ->  q_proj.weight int8, q_proj.weight_scale float32
    experts.0.up_proj.weight bf16  ->  the same two; or those of all experts, stacked
    norm.weight bf16    ->  norm.weight bf16

Where there is a calibration, what it speaks of is stored its way, norms included.
Codes pass through: what is quantized already is never quantized again.
"""

from __future__ import annotations

import functools
from collections.abc import Iterable, Mapping
from types import MappingProxyType

import torch
from torch import Tensor

from flashquant.errors import UnsupportedEngine
from flashquant.plan import TensorPlan
from flashquant.profiles import Calibration
from flashquant.schemes import (
    Doubts,
    Quantize,
    check_finite,
    check_int4,
    has_groups,
    holds_codes,
    quantizer,
)


class Recipe:
    """How the tensors of one name are stored, whenever they come.

    Attributes:
        name: of the tensor, as the trainer sends it.
        scale_name: of the scales that are made of it.
        dtypes: of the parameters it lands in.
        loads: the dtype in which the engine's loader holds it until codes are made of it; None
            where it is sent codes, which are then made of what the trainer sends.
        scheme: that it is stored in, where it becomes codes.
        has_groups: whether a row of its codes has several scales.
        calibration: of an engine that is served through a profile, if that speaks of it.

    """

    def __init__(
        self,
        name: str,
        entry: TensorPlan,
        parameters: Mapping[str, Tensor],
        calibration: Calibration | None = None,
        loaded: Mapping[str, Tensor] = MappingProxyType({}),
        scheme: str = "",
    ) -> None:
        """Args:
        entry: its plan.
        parameters: every parameter as it is stored, on meta.
        loaded: the same as the engine's loader fills them.
        scheme: that the engine stores it in.

        """
        self.name, self.scale_name = name, f"{name}_scale"
        self.dtypes = tuple(parameters[target].dtype for target in entry.targets)
        self.calibration = calibration if calibration and name in calibration else None
        codes = (t for t in entry.targets if holds_codes(parameters[t].dtype))
        self._codes = next(codes, None)
        form = loaded.get(self._codes) if self._codes else None
        self.loads = form.dtype if form is not None and is_float(form) else None
        self._entry = entry
        self._parameters, self.scheme = parameters, scheme
        self.has_groups = self._codes is not None and has_groups(scheme)

    @property
    def makes_codes(self) -> bool:
        """Whether floats become codes."""
        return self._codes is not None

    @functools.cached_property
    def takes_codes(self) -> tuple[torch.dtype, torch.dtype] | None:
        """The dtypes of the codes and scales that may be sent of it, made by the definition of its
        scheme; None where floats have to come."""
        entry = self._entry
        if self._codes is None or self.calibration or entry.needs_loader or entry.turns_rows:
            return None
        if self.has_groups:
            return None  # a byte for each code of four bits: floats say more in twice the room
        codes, scales = self._parameters[self._codes], self._parameters.get(f"{self._codes}_scale")
        try:
            quantizer(codes, scales, self._codes, self.scheme)
        except UnsupportedEngine:
            return None
        return None if scales is None else (codes.dtype, scales.dtype)

    @functools.cached_property
    def quantize(self) -> Quantize:
        """What makes codes and scales of the tensor, as it comes.

        Raises:
            UnsupportedEngine: the parameters store codes in none of our schemes, or it cannot
                be told what becomes of its rows.

        """
        if self._codes is None:
            raise ValueError(f"{self.name} is stored as it comes")
        if self._entry.needs_loader:
            raise UnsupportedEngine(
                f"the engine's loader does more than copy {self.name} into {self._codes}, so "
                "flashquant cannot tell its output channels, of which each has a scale. Serve "
                "this model in bf16."
            )
        scales = self._parameters.get(f"{self._codes}_scale")
        turned = self._entry.turns_rows
        quantize = quantizer(
            self._parameters[self._codes],
            scales,
            self._codes,
            self.scheme,
            stacked=turned or len(self._entry.shape) > 2,
        )
        return functools.partial(_turned, quantize) if turned else quantize


def as_stored(
    recipe: Recipe,
    tensor: Tensor,
    into: Tensor | None = None,
    doubts: Doubts | None = None,
) -> Iterable[tuple[str, Tensor]]:
    """The tensor itself, or its codes and its scales, each under its checkpoint name.

    Args:
        recipe: of its name.
        tensor: `[N, K]` where it is to be quantized, or `[E, N, K]`, unsharded; transposed where
            the engine's loader transposes it.
        into: `[N, K]`, where the codes are to be written; new memory if not given.
        doubts: takes what a device would have to be waited for.

    Raises:
        MisfitTensor: values that are not finite, or would not be once stored.
        UnsupportedEngine: the parameters store codes in none of our schemes.

    """
    tensor, name = tensor.contiguous(), recipe.name
    if recipe.calibration is not None:
        stored = list(recipe.calibration.stored(name, tensor, into, doubts))
        for stored_name, values in stored:
            check_finite(stored_name, values, [values.dtype], doubts)
        return stored
    if not (recipe.makes_codes and is_float(tensor)):
        if recipe.has_groups:
            check_int4(name, tensor)
        check_finite(name, tensor, recipe.dtypes, doubts)
        return ((name, tensor),)
    if recipe.loads is not None and recipe.loads != tensor.dtype:
        check_finite(name, tensor, (recipe.loads,), doubts)
        tensor = tensor.to(recipe.loads)
    codes, scales = recipe.quantize(tensor, into)
    # A row that holds NaN or Inf has such an absolute maximum, so its scale tells.
    check_finite(name, scales, (), doubts)
    return ((name, codes), (recipe.scale_name, scales))


def _turned(quantize: Quantize, weight: Tensor, _: Tensor | None) -> tuple[Tensor, Tensor]:
    """Of what comes transposed, `[K, N]` or `[E, K, N]`; the scales are `[..., N, 1]`."""
    codes, scales = quantize(weight.mT.contiguous(), None)
    return codes.mT, scales


def is_float(tensor: Tensor) -> bool:
    """Whether these are a trainer's weights, rather than codes."""
    return tensor.is_floating_point() and tensor.dtype.itemsize > 1
