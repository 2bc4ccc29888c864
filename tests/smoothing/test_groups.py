"""int4: the smoothing and the part of each group at which a layer's output loses least."""

from __future__ import annotations

import pytest
import torch

from flashquant.profiles.making import Producer, Site
from flashquant.profiles.making.groups import PART, alone, choose_for_groups
from flashquant.profiles.making.search import Seen
from flashquant.schemes import int4_refreshed

SITE = Site((Producer("norm.weight", 0, 16),), ("a.weight", "b.weight"))


def drawn() -> tuple[Seen, dict[str, torch.Tensor]]:
    dice = torch.Generator().manual_seed(0)
    rows = torch.randn(64, 16, generator=dice)
    rows[:, 3] *= 60  # an outlier
    weights = {name: torch.randn(12, 16, generator=dice) * 0.05 for name in SITE.consumers}
    return Seen(rows.abs().amax(0), rows), weights


def lost(seen: Seen, weight: torch.Tensor, by: torch.Tensor, held: torch.Tensor) -> torch.Tensor:
    """What one layer's output is off, by its definition."""
    group = weight.shape[1] // held.shape[1]
    codes, scales = int4_refreshed(weight, by, None, held, group=group)
    stands_for = codes * scales.float().repeat_interleave(group, 1) / by
    return (seen.rows @ (stands_for - weight).T).square().sum()


@pytest.mark.parametrize("group", [8, -1])
def test_large_inputs_are_smoothed_and_the_error_is_the_one_that_was_meant(group: int) -> None:
    seen, weights = drawn()

    chosen, held = choose_for_groups(SITE, seen, weights, group)

    off = sum(lost(seen, weights[name], chosen.by, held[name]) for name in SITE.consumers)
    size = sum((seen.rows @ weight.T).square().sum() for weight in weights.values())
    assert chosen.by[3] > chosen.by.median()
    assert chosen.error == pytest.approx(float(off / size) ** 0.5, rel=1e-3)
    assert chosen.error < 0.6 * chosen.error_without


def test_no_other_part_of_a_group_loses_less() -> None:
    """Of one group a row, so that the loss of a row is that of its group."""
    seen, weights = drawn()
    site = Site((), ("a.weight",))
    weight = weights["a.weight"]

    _, held = choose_for_groups(site, seen, weights, -1)

    ones = torch.ones(16)
    for row in range(len(weight)):
        here = weight[row : row + 1]
        best = lost(seen, here, ones, held["a.weight"][row : row + 1])
        for part in PART:
            other = torch.full((1, 1), part, dtype=torch.uint8)
            assert best <= lost(seen, here, ones, other) * (1 + 1e-4)


def test_layers_of_no_site_are_looked_at_by_themselves() -> None:
    assert list(alone([SITE], ["a.weight", "o.weight"])) == [Site((), ("o.weight",))]
