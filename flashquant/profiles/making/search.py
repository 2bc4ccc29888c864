"""How strongly each site is smoothed: the strength that costs its layers the least.

    s = max|x| ** a  /  max|W| ** (1 - a)          a channel; SmoothQuant's equation 4

For each a on a grid, and for no smoothing at all, the layers that read the site are computed as
the kernels do (int8 codes, a scale a token and a scale a row) on tokens that were seen, and
compared with the exact product. s is rounded to a power of two: then dividing a norm and
multiplying a column is exact in bf16, in every later push too, and only codes are rounded.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Final

import torch
from torch import Tensor, nn

from flashquant.errors import ProfileError
from flashquant.profiles.making.discovery import linear_layers
from flashquant.profiles.making.factors import Factors, Site
from flashquant.schemes import int8_channel

STRENGTHS: Final = (0.0, 0.1, 0.2, 0.3, 0.4, 0.5, 0.6, 0.7, 0.8, 0.9, 1.0)
_TOKENS_KEPT: Final = 512  # of each layer's inputs, to compare products on


@dataclass(frozen=True)
class Seen:
    """What went into a layer.

    Attributes:
        peaks: `[K]` float32, max |x| of each channel over every token.
        rows: `[tokens, K]` float32, a sample.

    """

    peaks: Tensor
    rows: Tensor


@dataclass(frozen=True)
class Chosen:
    """What was decided for one site.

    Attributes:
        strength: None where not smoothing is best.
        error: of its layers' outputs, relative, with it.
        error_without: the same without smoothing.
        by: `[K]` float32, what its channels are divided by.

    """

    site: Site
    strength: float | None
    error: float
    error_without: float
    by: Tensor


def watch(
    model: nn.Module,
    sites: Sequence[Site],
    batches: Iterable[Tensor],
    note_progress: Callable[[int], None] = lambda tokens: None,
) -> dict[Site, Seen]:
    """Run a calibration set through the model, and look at what the sites hold.

    Args:
        model: in evaluation mode.
        sites: of this model.
        batches: tokens `[batch, length]`, more than one text.
        note_progress: called with how many tokens have gone through.

    Raises:
        ProfileError: the calibration set is empty, or an activation is not finite.

    """
    layers = linear_layers(model)
    peaks: dict[Site, Tensor] = {}
    rows: dict[Site, list[Tensor]] = {site: [] for site in sites}
    dice = torch.Generator().manual_seed(0)
    share = 1.0

    def look(site: Site) -> Callable[..., None]:
        def hook(_: nn.Module, inputs: tuple[Any, ...]) -> None:
            x = inputs[0].detach().flatten(0, -2).float()
            peak = x.abs().amax(0)
            peaks[site] = torch.maximum(peaks[site], peak) if site in peaks else peak
            count = max(1, min(len(x), round(_TOKENS_KEPT * share)))
            picked = torch.randperm(len(x), generator=dice, device="cpu")[:count]
            rows[site].append(x[picked.to(x.device)])

        return hook

    every = list(batches)
    if not every:
        raise ProfileError("the calibration set is empty; give it some thousand tokens of text")
    share = 1 / len(every)
    handles = [
        layers[site.consumers[0].removesuffix(".weight")].register_forward_pre_hook(look(site))
        for site in sites
    ]
    try:
        with torch.no_grad():
            for tokens in every:
                model(input_ids=tokens)
                note_progress(tokens.numel())
    finally:
        for handle in handles:
            handle.remove()
    for site, peak in peaks.items():
        if not peak.isfinite().all():
            raise ProfileError(
                f"what {site.consumers[0]} reads is not finite; load the model in float32"
            )
    return {site: Seen(peaks[site], torch.cat(rows[site])) for site in sites}


def choose(
    site: Site, seen: Seen, weights: Mapping[str, Tensor], strengths: Sequence[float] = STRENGTHS
) -> Chosen:
    """The strength at which the layers that read a site lose least.

    Args:
        site: to be smoothed.
        seen: what its layers read.
        weights: `[N, K]`, by the names of its consumers.
        strengths: to be tried, from 0 (only weights count) to 1 (only activations).

    """
    readers = [weights[name].float() for name in site.consumers]
    exact = [seen.rows @ weight.T for weight in readers]
    columns = torch.stack([weight.abs().amax(0) for weight in readers]).amax(0)
    none = torch.ones_like(seen.peaks)

    def error(by: Tensor) -> float:
        x = _quantized(seen.rows / by)
        off = size = 0.0
        for weight, wanted in zip(readers, exact, strict=True):
            off += float((x @ _quantized(weight * by).T - wanted).square().sum())
            size += float(wanted.square().sum())
        return (off / size) ** 0.5 if size else 0.0

    without = best = error(none)
    chosen: tuple[float | None, Tensor] = (None, none)
    for strength in strengths:
        by = smoothing(seen.peaks, columns, strength)
        if (found := error(by)) < best:
            best, chosen = found, (strength, by)
    return Chosen(site, chosen[0], best, without, chosen[1])


def smoothing(peaks: Tensor, columns: Tensor, strength: float) -> Tensor:
    """`[K]` powers of two about 1; 1 for a channel that is dead on either side."""
    alive = (peaks > 0) & (columns > 0)
    log = (
        strength * peaks.clamp_min(1e-30).log2() - (1 - strength) * columns.clamp_min(1e-30).log2()
    )
    if not alive.any():
        return torch.ones_like(peaks)
    # How large all are together changes nothing: a token and a row have scales of their own.
    log = (log - log[alive].median()).round().clamp(-12, 12)
    return torch.where(alive, torch.exp2(log), 1.0)


def factors_of(choices: Iterable[Chosen], parameters: Mapping[str, Tensor]) -> Factors:
    """All that was decided, as factors of tensors."""
    factors = Factors()
    for choice in choices:
        if choice.strength is not None:
            lengths = {p.name: len(parameters[p.name]) for p in choice.site.producers}
            factors.smooth(choice.site, choice.by.cpu(), lengths)
    return factors


def _quantized(rows: Tensor) -> Tensor:
    codes, scales = int8_channel(rows)
    return codes.float() * scales
