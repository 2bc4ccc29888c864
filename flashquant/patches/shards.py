"""Scales that span the shards of several workers, without asking the others.

Where one scale covers rows or columns that tensor parallelism has cut up, vLLM asks the other
ranks for the maxima of their shards, layer by layer, while it processes the weights. In
an update that would be the death of all or nothing: a rank that fails alone leaves the others
waiting for its answer. But every rank is sent whole tensors, and knows the maxima of what it
has cut off. So it answers itself; the bits are the same.
"""

from __future__ import annotations

import logging
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from contextvars import ContextVar
from typing import Any

import torch
from torch import Tensor

from flashquant.patches.point import PatchPoint
from flashquant.write import Stage

logger = logging.getLogger(__name__)


class Maxima:
    """The absolute maxima of the whole tensors of one layer.

    Args:
        stages: of its parameters that have arrived; none where the values do not matter.

    """

    def __init__(self, stages: Sequence[Stage]) -> None:
        self._stages = [stage for stage in stages if stage.dim == 2]
        self._any = not stages

    def instead_of(self, shards: Tensor) -> Tensor | None:
        """The maxima over all shards, given those of one; None where they are not known.

        One for the whole layer, or one a row where every row is cut and its rows came in
        one tensor.
        """
        if self._any:
            return shards
        if len(self._stages) != 1:
            return None
        (stage,) = self._stages
        known = [rows for rows in stage.maxima.values() if rows is not None]
        if len(known) < len(stage.maxima):
            return None
        if shards.numel() == 1:
            return torch.stack([rows.max() for rows in known]).max()
        return known[0] if len(known) == 1 and known[0].numel() == shards.numel() else None


_maxima: ContextVar[Maxima | None] = ContextVar("flashquant_maxima", default=None)


@contextmanager
def answered_by(maxima: Maxima) -> Iterator[None]:
    """Process a layer whose whole tensors have these maxima."""
    before = _maxima.set(maxima)
    try:
        yield
    finally:
        _maxima.reset(before)


def _amax_for_tp_weight_quant(original: Any, amax: Tensor, is_sharded: bool) -> Any:
    maxima = _maxima.get()
    if maxima is None or not is_sharded:
        return original(amax, is_sharded)
    whole = maxima.instead_of(amax)
    if whole is None:
        logger.warning(
            "a layer of this model gathers its scale from tensors that flashquant has not seen "
            "whole, so the ranks ask each other while they process it. If one of them fails just "
            "then, the others wait until torch.distributed gives up. Please report this model."
        )
        return original(amax, is_sharded)
    return amax.copy_(whole.reshape(amax.shape))


POINTS = (
    PatchPoint(
        "vllm.model_executor.layers.quantization.online.fp8:amax_for_tp_weight_quant",
        expects=("amax", "is_sharded"),
        wrapper=_amax_for_tp_weight_quant,
        within=">=0.28",  # before, each rank scales its own shard
    ),
)
