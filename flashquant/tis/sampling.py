"""Log-probs over the tokens that the sampler kept (Keep Sampling Mask, DeepSeek-V3.2, 2512.02556).

Under top-k, top-p or min-p a token is sampled from the survivors, and vLLM's processed log-prob is
normalized over them. A trainer normalizes over the whole vocabulary: its log-probs are lower, at
every token, although nothing about the policy differs. Here the trainer's are over the same
survivors:

    log p(token) = logit(token) / temperature - logsumexp(logits of those kept / temperature)

Which tokens were kept, the engine says (`return_sampling_mask=True`, vLLM 0.28 and newer, its
second model runner). Where it cannot, `Truncation` repeats the cut on the trainer's own logits.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from flashquant.errors import CorrectionError

# float32 elements that exist beside the logits at a time: 27 positions of a vocabulary of 152k.
_CHUNK = 1 << 22

Span = tuple[int, slice]


class SamplingMask(Protocol):
    """vLLM's, of one completion: `output.sampling_mask`."""

    token_ids: list[list[int]]


Lists = Sequence[Sequence[int]]
Kept = Sequence[SamplingMask | Lists]


@dataclass(frozen=True)
class Truncation:
    """The cut of vLLM's sampler, repeated on the trainer's logits: an approximation.

    In vLLM's order: temperature, min-p, then top-k, then top-p of what top-k left. The two engines'
    logits differ a little, so a token at the edge may be in on one side only; the sampled token is
    in, whatever the trainer thinks of it. Tokens exactly as likely as the last one kept are kept.
    Penalties, logit bias and allowed tokens of a request are not repeated.

    Attributes:
        top_k: the most likely that stay; None, 0 or -1 for all (vLLM's 0 and -1).
        top_p: the fewest of them that hold this probability stay; 1 for all.
        min_p: what is less likely than this times the most likely token goes; 0 for nothing.

    """

    top_k: int | None = None
    top_p: float = 1.0
    min_p: float = 0.0

    def __post_init__(self) -> None:
        """Refuse what vLLM would.

        Raises:
            CorrectionError: a value is out of its range.

        """
        if self.top_k is not None and self.top_k < -1:
            raise CorrectionError(f"top_k={self.top_k}, but is at least 1, or None for all")
        if not 0 < self.top_p <= 1:
            raise CorrectionError(f"top_p={self.top_p:g}, but is above 0 and at most 1")
        if not 0 <= self.min_p <= 1:
            raise CorrectionError(f"min_p={self.min_p:g}, but is between 0 and 1")

    def floor(self, scaled: Tensor) -> Tensor:
        """`[N, 1]`: the smallest of `[N, V]` logits, already over temperature, that stay."""
        floor = torch.full_like(scaled[:, :1], -math.inf)
        if self.min_p > 0:
            floor = scaled.amax(-1, keepdim=True) + math.log(self.min_p)
        if self.top_k is not None and 0 < self.top_k < scaled.shape[-1]:
            floor = torch.maximum(floor, scaled.topk(self.top_k).values[:, -1:])
        return floor if self.top_p == 1 else self._nucleus(scaled, floor)

    def _nucleus(self, scaled: Tensor, floor: Tensor) -> Tensor:
        stays = scaled >= floor
        left = scaled.masked_fill(~stays, -math.inf)
        # Ascending, as vLLM sums: the last one is the most likely, and always stays.
        ranked = left.topk(int(stays.sum(-1).max())).values.flip(-1)
        dropped = ranked.softmax(-1).cumsum(-1) <= 1 - torch.tensor(self.top_p)
        dropped[:, -1] = False
        return ranked.masked_fill(dropped, math.inf).amin(-1, keepdim=True)


class _Support(Protocol):
    """Which tokens were kept at some positions."""

    def among(self, scaled: Tensor, span: Span) -> Tensor: ...


@dataclass(frozen=True)
class _AtLeast:
    floors: Tensor  # [B, T]

    def among(self, scaled: Tensor, span: Span) -> Tensor:
        return scaled >= self.floors[span].unsqueeze(-1)


@dataclass(frozen=True)
class _Listed:
    ids: Tensor  # of all positions, one after another
    ends: Tensor  # [B * T + 1], where the ids of each position begin, on the CPU
    length: int

    def among(self, scaled: Tensor, span: Span) -> Tensor:
        row, columns = span
        ends = self.ends[row * self.length + columns.start : row * self.length + columns.stop + 1]
        ids = self.ids[int(ends[0]) : int(ends[-1])]
        places = torch.arange(len(scaled), device=ids.device).repeat_interleave(
            ends.diff().to(ids.device)
        )
        listed = torch.zeros_like(scaled, dtype=torch.bool)
        listed[places, ids] = True
        return listed


def masked_logprobs(
    logits: Tensor,
    tokens: Tensor,
    kept: Truncation | Kept,
    *,
    temperature: float = 1.0,
    mask: Tensor | None = None,
) -> Tensor:
    """Log-probs of the sampled tokens, normalized over those that the sampler kept.

    Beside the logits and their gradient (of their shape and dtype) nothing of size `[B, T, V]`
    exists: positions are taken a few at a time, in float32, and once more on the way back.

    Args:
        logits: `[B, T, V]`, floating point; those that predict `tokens`. Gradients flow here.
        tokens: `[B, T]`, the ids that were sampled.
        kept: what the sampler kept: for each row vLLM's `output.sampling_mask`, or a list of ids
            for each unmasked token, in order; or a `Truncation`, which repeats the cut.
        temperature: of the sampler; logits are divided by it.
        mask: `[B, T]`, True on the tokens that were sampled. Whatever stands elsewhere has no
            influence, and its log-prob is 0. None: all were.

    Returns:
        `[B, T]` float32.

    Raises:
        CorrectionError: shapes differ, the temperature is not above 0, an id is outside of the
            vocabulary, lists and unmasked tokens differ in number, or a sampled token is not in
            its list.

    """
    unmasked = _checked(logits, tokens, temperature, mask)
    chosen = tokens.masked_fill(~unmasked, 0)
    spans = list(_spans(unmasked, max(1, _CHUNK // logits.shape[-1])))
    support = _supported(kept, logits.detach(), chosen, unmasked, temperature, spans)
    apply: Callable[..., Tensor] = _Renormalized.apply
    return apply(logits, chosen, unmasked, support, temperature, spans)


class _Renormalized(torch.autograd.Function):
    """The formula, a few positions at a time; what is between is computed again on the way back."""

    @staticmethod
    def forward(
        ctx: Any,
        logits: Tensor,
        tokens: Tensor,
        mask: Tensor,
        support: _Support,
        temperature: float,
        spans: list[Span],
    ) -> Tensor:
        norms = torch.zeros_like(tokens, dtype=torch.float32)
        values = torch.zeros_like(norms)
        for span in spans:
            scaled, among, chosen = _positions(logits, tokens, support, temperature, span)
            norms[span] = scaled.masked_fill(~among, -math.inf).logsumexp(-1)
            values[span] = scaled.gather(-1, chosen).squeeze(-1) - norms[span]
        ctx.save_for_backward(logits, tokens, mask, norms)
        ctx.how = (support, temperature, spans)
        return values.masked_fill(~mask, 0.0)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, slope: Tensor) -> tuple[Tensor | None, ...]:
        logits, tokens, mask, norms = ctx.saved_tensors
        support, temperature, spans = ctx.how
        slope = slope.float().masked_fill(~mask, 0.0) / temperature
        gradient = torch.zeros_like(logits)
        for span in spans:
            scaled, among, chosen = _positions(logits, tokens, support, temperature, span)
            scaled.sub_(norms[span].unsqueeze(-1)).exp_().masked_fill_(~among, 0.0)
            of_span = slope[span].unsqueeze(-1)
            scaled.mul_(-of_span).scatter_add_(-1, chosen, of_span)
            gradient[span] = scaled.masked_fill_(~mask[span].unsqueeze(-1), 0.0)
        return gradient, None, None, None, None, None


def _positions(
    logits: Tensor, tokens: Tensor, support: _Support, temperature: float, span: Span
) -> tuple[Tensor, Tensor, Tensor]:
    """Logits over temperature `[N, V]`, which of them were kept, and the sampled ids `[N, 1]`."""
    scaled = _scaled(logits, temperature, span)
    chosen = tokens[span].unsqueeze(-1)
    return scaled, support.among(scaled, span).scatter_(-1, chosen, True), chosen


def _scaled(logits: Tensor, temperature: float, span: Span) -> Tensor:
    """A copy in float32."""
    return logits[span].to(torch.float32, copy=True).div_(temperature)


def _supported(
    kept: Truncation | Kept,
    logits: Tensor,
    tokens: Tensor,
    mask: Tensor,
    temperature: float,
    spans: list[Span],
) -> _Support:
    if not isinstance(kept, Truncation):
        return _listed(kept, tokens, mask, logits.shape[-1])
    floors = torch.zeros_like(tokens, dtype=torch.float32)
    for span in spans:
        floors[span] = kept.floor(_scaled(logits, temperature, span)).squeeze(-1)
    return _AtLeast(floors)


def _listed(kept: Kept, tokens: Tensor, mask: Tensor, vocabulary: int) -> _Listed:
    # Not by its type: vLLM's own is another class, of which this room knows nothing.
    rows = [row if isinstance(row, Sequence) else row.token_ids for row in kept]
    _check_counts([len(row) for row in rows], mask.sum(-1).tolist())
    ids = torch.tensor([i for row in rows for place in row for i in place], dtype=torch.long)
    if len(ids) and not 0 <= int(ids.min()) <= int(ids.max()) < vocabulary:
        raise CorrectionError(
            f"kept names tokens from {int(ids.min())} to {int(ids.max())}, but the logits have a "
            f"vocabulary of {vocabulary}"
        )
    counts = torch.zeros(mask.numel(), dtype=torch.long)
    places = mask.flatten().cpu().nonzero().squeeze(-1)
    counts[places] = torch.tensor([len(place) for row in rows for place in row], dtype=torch.long)
    _check_sampled(ids, counts, tokens.cpu(), mask.cpu())
    ends = torch.cat([torch.zeros(1, dtype=torch.long), counts.cumsum(0)])
    return _Listed(ids.to(tokens.device), ends, tokens.shape[-1])


def _check_counts(lists: list[int], sampled: list[int]) -> None:
    if lists != sampled:
        raise CorrectionError(
            f"kept has {lists} lists of tokens in its rows, and the rows have {sampled} sampled "
            "ones. Give one list for each unmasked token, in order, and a mask that is True on "
            "what was sampled alone."
        )


def _check_sampled(ids: Tensor, counts: Tensor, tokens: Tensor, mask: Tensor) -> None:
    owners = torch.arange(len(counts)).repeat_interleave(counts)
    found = torch.zeros(len(counts), dtype=torch.bool)
    found[owners[ids == tokens.flatten()[owners]]] = True
    missing = (mask & ~found.view_as(mask)).nonzero()
    if len(missing):
        row, column = missing[0].tolist()
        raise CorrectionError(
            f"token {int(tokens[row, column])} was sampled at [{row}, {column}], but the list of "
            f"what was kept there is without it ({len(missing)} such places). Lists and tokens are "
            "not of the same positions: give those of one request in order."
        )


def _spans(mask: Tensor, step: int) -> Iterator[Span]:
    """Stretches of rows with an unmasked token in them."""
    for row, counts in enumerate(mask.cpu()):
        for start in range(0, len(counts), step):
            stop = min(start + step, len(counts))
            if bool(counts[start:stop].any()):
                yield row, slice(start, stop)


def _checked(logits: Tensor, tokens: Tensor, temperature: float, mask: Tensor | None) -> Tensor:
    if logits.dim() != 3 or not logits.is_floating_point():
        raise CorrectionError(
            f"logits are {logits.dtype} of shape {tuple(logits.shape)}, but are floating point and "
            "[B, T, V]"
        )
    for name, values in (("tokens", tokens), ("mask", tokens if mask is None else mask)):
        if values.shape != logits.shape[:2]:
            raise CorrectionError(
                f"{name} has shape {tuple(values.shape)} and the logits {tuple(logits.shape)}. "
                "Give [B, T] and [B, T, V] of the same positions: logits[:, :-1] predict "
                "tokens[:, 1:]."
            )
    if not (temperature > 0 and math.isfinite(temperature)):
        raise CorrectionError(
            f"temperature={temperature:g}, but is above 0: greedy tokens were not sampled, and "
            "have no distribution"
        )
    unmasked = torch.ones_like(tokens, dtype=torch.bool) if mask is None else mask.bool()
    wrong = unmasked & ((tokens < 0) | (tokens >= logits.shape[-1]))
    if bool(wrong.any()):
        row, column = wrong.nonzero()[0].tolist()
        raise CorrectionError(
            f"tokens[{row}, {column}] is {int(tokens[row, column])}, and the vocabulary has "
            f"{logits.shape[-1]}. Mask what was not sampled."
        )
    return unmasked
