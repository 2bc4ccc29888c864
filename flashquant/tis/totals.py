"""Means over micro-batches and data-parallel ranks, from sums and counts.

    denominator = sum(correction.denominator(old, rollout, mask) for ... in micro_batches)
    denominator = denominator.reduce(group)
    for ... in micro_batches:
        value, metrics = loss(..., denominator=denominator)

The values of all micro-batches of all ranks then add up to the loss of one process that has the
whole batch. A trainer that averages gradients over ranks (DDP, FSDP) has divided them by their
number once more: multiply the value by it.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor
from torch import distributed as dist


@dataclass(frozen=True)
class Denominator:
    """What the mean of a loss is divided by; 0-d float64 tensors.

    Attributes:
        terms: kept tokens, or sequences that have one.
        units: what has a weight of its own: unmasked tokens, or sequences with one.
        weight: the sum of the units' weights, by whose mean `normalize=True` divides.

    """

    terms: Tensor
    units: Tensor
    weight: Tensor

    def __add__(self, other: Denominator) -> Denominator:
        """Of two micro-batches together."""
        return Denominator(
            self.terms + other.terms, self.units + other.units, self.weight + other.weight
        )

    def __radd__(self, other: int) -> Denominator:
        """`sum` begins with 0."""
        return self if other == 0 else NotImplemented

    def reduce(self, group: dist.ProcessGroup | None = None) -> Denominator:
        """Of all ranks of a group together; every rank calls it. None: torch's default group."""
        terms, units, weight = gathered(
            torch.stack([self.terms, self.units, self.weight]), group
        ).sum(0)
        return Denominator(terms, units, weight)

    def average_weight(self) -> Tensor:
        """0-d float32."""
        return (self.weight / self.units.clamp(min=1)).float()


def gathered(values: Tensor, group: dist.ProcessGroup | None) -> Tensor:
    """`[ranks, n]` of each rank's `[n]`; without torch.distributed, of this process alone."""
    if not (dist.is_available() and dist.is_initialized()):
        return values.unsqueeze(0)
    parts = [torch.empty_like(values) for _ in range(dist.get_world_size(group))]
    dist.all_gather(parts, values.contiguous(), group=group)
    return torch.stack(parts)


def pooled(means: Tensor, counts: Tensor) -> Tensor:
    """The mean over everything, of the means of its parts and how many each is of."""
    return (means * counts).sum() / counts.sum().clamp(min=1)
