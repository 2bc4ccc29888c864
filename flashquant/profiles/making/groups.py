"""How a layer is smoothed for int4, and how much of each group its codes reach.

    s    = mean|x| ** a            a channel, a power of two
    held = 0.60, 0.65 ... 1.10     a group, of its absolute maximum

The first is AWQ's (Lin et al., 2023, arXiv:2306.00978).
Activations stay in bf16, so only weights are rounded: s makes the columns that are read with large
numbers larger among their group. Both are chosen by what the layer's output loses on tokens that
were seen: s among eleven strengths and none, held group by group.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Final

import torch
from torch import Tensor

from flashquant.profiles.making.factors import Site
from flashquant.profiles.making.search import STRENGTHS, Chosen, Seen
from flashquant.schemes import int4_refreshed

PART: Final = tuple(range(60, 115, 5))
"""In hundredths; more than all of it may fit the other codes better."""

_MOST_ROWS: Final = 2048  # of a layer, looked at together


def choose_for_groups(
    site: Site, seen: Seen, weights: Mapping[str, Tensor], group: int
) -> tuple[Chosen, dict[str, Tensor]]:
    """The smoothing at which the layers that read a site lose least, and what their groups hold.

    Args:
        site: to be smoothed; without producers, only the groups of its layers are chosen.
        seen: what its layers read.
        weights: `[N, K]`, by the names of its consumers.
        group: how many columns share a scale; -1 for a whole row.

    Returns:
        What was chosen for the site, and `[N, K / group]` uint8 hundredths by layer.

    """
    width = seen.rows.shape[1] if group == -1 else group
    readers = {name: weights[name].detach().float() for name in site.consumers}
    size = sum(float((seen.rows @ w.T).square().sum()) for w in readers.values())
    none = torch.ones_like(seen.peaks)

    def error(by: Tensor, held: Mapping[str, Tensor]) -> float:
        off = 0.0
        for name, weight in readers.items():
            rounded = _rounded(weight * by, held[name], width)
            off += float((seen.rows @ (rounded / by - weight).T).square().sum())
        return (off / size) ** 0.5 if size else 0.0

    whole = {name: _all_of(weight, width) for name, weight in readers.items()}
    best = without = error(none, whole)
    chosen: tuple[float | None, Tensor] = (None, none)
    for tried in STRENGTHS[1:] if site.producers else ():
        by = _smoothing(seen.rows, tried)
        if (found := error(by, whole)) < best:
            best, chosen = found, (tried, by)
    strength, by = chosen
    grams = _grams(seen.rows / by, width)
    held = {name: _held(weight * by, grams, width) for name, weight in readers.items()}
    return Chosen(site, strength, error(by, held), without, by), {
        name: hundredths.cpu() for name, hundredths in held.items()
    }


def _smoothing(rows: Tensor, strength: float) -> Tensor:
    """`[K]` powers of two about 1; 1 for a channel that is never read."""
    mean = rows.abs().mean(0)
    alive = mean > 0
    if not alive.any():
        return torch.ones_like(mean)
    log = strength * mean.clamp_min(1e-30).log2()
    log = (log - log[alive].median()).round().clamp(-12, 12)
    return torch.where(alive, torch.exp2(log), 1.0)


def _held(weight: Tensor, grams: Tensor, width: int) -> Tensor:
    """`[N, K / width]` uint8: the part at which each group's share of the output loses least."""
    return torch.cat([_held_of(rows, grams, width) for rows in torch.split(weight, _MOST_ROWS)])


def _held_of(weight: Tensor, grams: Tensor, width: int) -> Tensor:
    best = held = _all_of(weight, width)
    least: Tensor | None = None
    for part in PART:
        held = torch.full_like(best, part)
        off = (_rounded(weight, held, width) - weight).view(len(weight), -1, width).transpose(0, 1)
        loss = ((off @ grams) * off).sum(-1).T
        if least is None:
            best, least = held, loss
            continue
        better = loss < least
        best, least = torch.where(better, held, best), torch.where(better, loss, least)
    return best


def _grams(rows: Tensor, width: int) -> Tensor:
    """`[K / width, width, width]`: how the channels of each group go together."""
    groups = rows.view(len(rows), -1, width).transpose(0, 1)
    return groups.mT @ groups


def _rounded(weight: Tensor, held: Tensor, width: int) -> Tensor:
    codes, scales = int4_refreshed(weight, None, None, held, group=width)
    return codes * scales.float().repeat_interleave(width, 1)


def _all_of(weight: Tensor, width: int) -> Tensor:
    form = (len(weight), weight.shape[1] // width)
    return torch.full(form, 100, dtype=torch.uint8, device=weight.device)


def alone(sites: list[Site], layers: list[str]) -> Iterator[Site]:
    """Each layer that no site is read by, by itself: its groups are chosen all the same."""
    read = {name for site in sites for name in site.consumers}
    yield from (Site((), (name,)) for name in layers if name not in read)
