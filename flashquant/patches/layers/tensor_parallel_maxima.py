"""Scales that span tensor-parallel shards, without asking the other workers.

Where one scale covers rows or columns that tensor parallelism has cut up, vLLM asks the other
ranks for the maxima of their shards, layer by layer, while it processes the weights. In
an update that would be the end of all or nothing: a rank that fails alone leaves the others
waiting for its answer. But every rank is sent whole tensors, and knows the maxima of what it
has cut off. So it answers itself; the bits are the same.

vLLM's processing lies between who knows the maxima (`answered_by`, around the processing) and
who is asked for them (the wrapped functions), so they travel in a context variable.
"""

from __future__ import annotations

import logging
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from flashquant.patches.channels import Ambient
from flashquant.patches.point import PatchPoint
from flashquant.update import Stage

logger = logging.getLogger(__name__)


class Maxima:
    """The absolute maxima of the whole tensors of one layer.

    Args:
        stages: of its parameters that have arrived; none where the values do not matter.

    """

    def __init__(self, stages: Sequence[Stage]) -> None:
        self._stages = [stage for stage in stages if len(stage.shape) == 2]
        self._experts = [stage for stage in stages if len(stage.shape) == 3]
        self._any = not stages

    def instead_of(self, amax: Tensor) -> Tensor | None:
        """The maxima over all shards, given those of one; None where they are not known.

        One for the whole layer, or one a row where every row is cut and its rows came in
        one tensor.
        """
        if self._any:
            return amax
        if len(self._stages) != 1:
            return None
        (stage,) = self._stages
        known = [rows for rows in stage.maxima.values() if rows is not None]
        if len(known) < len(stage.maxima):
            return None
        if amax.numel() == 1:
            return _largest(known, amax.device)
        return known[0] if len(known) == 1 and known[0].numel() == amax.numel() else None

    def of_experts(self, amax: Tensor) -> Tensor | None:
        """The same for experts `[E]`, or for each of their rows `[E, N, 1]`.

        Which of a layer's weights is asked about cannot be seen from the numbers of experts and
        rows alone; the maxima of this worker's own shard tell.
        """
        if self._any:
            return amax
        fitting = [stage for stage in self._experts if _is_about(amax, stage)]
        if len(fitting) != 1:
            return None
        experts = _by_expert(fitting[0])
        if any(rows is None for windows in experts for rows in windows):
            return None
        known = [[rows for rows in windows if rows is not None] for windows in experts]
        if amax.dim() == 1:
            return torch.stack([_largest(rows, amax.device) for rows in known])
        if any(len(rows) != 1 or rows[0].numel() != amax.shape[1] for rows in known):
            return None
        return torch.stack([rows[0].to(amax.device) for rows in known])


def _largest(maxima: Sequence[Tensor], device: torch.device) -> Tensor:
    """Of all of them; those of padding are on the host."""
    return torch.stack([rows.max().to(device) for rows in maxima]).max()


def _by_expert(stage: Stage) -> list[list[Tensor | None]]:
    """The row maxima of the whole tensors that have arrived for each expert of `[E, N, K]`."""
    experts: list[list[Tensor | None]] = [[] for _ in range(stage.shape[0])]
    each = stage.shape[1:].numel()
    for view, rows in stage.maxima.items():
        first, stacked = view.offset // each, len(view.shape) == 3
        for at in range(view.shape[0] if stacked else 1):
            experts[first + at].append(rows[at] if stacked and rows is not None else rows)
    return experts


def _is_about(amax: Tensor, stage: Stage) -> bool:
    """Whether these are the maxima of what has arrived in `[E, N, K]`."""
    if not stage.complete or stage.shape[0] != amax.shape[0]:
        return False
    weight = stage.memory(amax.device)
    low, high = torch.aminmax(weight.flatten(1) if amax.dim() == 1 else weight, dim=-1)
    held = torch.maximum(-low, high).flatten().float()
    return held.numel() == amax.numel() and torch.equal(held, amax.flatten().float())


_maxima = Ambient[Maxima]("flashquant_maxima")
answered_by = _maxima.given  # while a layer is processed, whose whole tensors have these maxima


def _amax_for_tp_weight_quant(original: Any, amax: Tensor, is_sharded: bool) -> Any:
    maxima = _maxima.get()
    if maxima is None or not is_sharded:
        return original(amax, is_sharded)
    whole = maxima.instead_of(amax)
    if whole is None:
        _warn_of_asking()
        return original(amax, is_sharded)
    return amax.copy_(whole.reshape(amax.shape))


def _amax_for_moe_weight_quant(original: Any, amax: Tensor, moe_tp_size: int) -> Any:
    maxima = _maxima.get()
    if maxima is None or moe_tp_size == 1:
        return original(amax, moe_tp_size)
    whole = maxima.of_experts(amax)
    if whole is None:
        _warn_of_asking()
        return original(amax, moe_tp_size)
    return amax.copy_(whole.reshape(amax.shape))


def _warn_of_asking() -> None:
    logger.warning(
        "a layer of this model gathers its scale from tensors that flashquant has not seen "
        "whole, so the ranks ask each other while they process it. If one of them fails just "
        "then, the others wait until torch.distributed gives up. Please report this model."
    )


POINTS = (
    PatchPoint(
        "vllm.model_executor.layers.quantization.online.fp8:amax_for_tp_weight_quant",
        expects=("amax", "is_sharded"),
        wrapper=_amax_for_tp_weight_quant,
        within=">=0.28",  # before, each rank scales its own shard
    ),
    PatchPoint(
        "vllm.model_executor.layers.quantization.online.fp8:amax_for_moe_weight_quant",
        expects=("amax", "moe_tp_size"),
        wrapper=_amax_for_moe_weight_quant,
        within=">=0.28",
    ),
)
