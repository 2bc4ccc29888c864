"""What keeps trainer and rollout apart: a sentence, and the numbers it is from.

With d the log ratio of a token (trainer's less the rollout's), sampled by the rollout's policy:

    sampling truncation   mean exp(d) is 1 where both may sample the same tokens, whatever else
                          differs. Where the rollout is normalized over fewer, it is the
                          probability that the trainer gives to those: below 1.
    stale weights         mean d^2 grows with the lag of the weights.
    routing               few tokens jump: the largest hundredth of d^2 holds more than half of it.
    quantization          none of them: rounding, of all tokens alike.

The first that holds is named; a smaller one may stand behind it.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor

from flashquant.tis.logged import Logged, gathered_from, read
from flashquant.tis.picture import draw

Cause = Literal["nothing", "sampling truncation", "stale weights", "routing", "quantization"]

# k3, nats a token: two bf16 engines of the same weights are about 1e-4 apart.
_AGREE = 2e-4
_FEW = 200  # tokens: the largest hundredth would be two of them


@dataclass(frozen=True)
class Report:
    """How far apart, and why.

    Attributes:
        cause: what dominates.
        sentence: the same in words, with the numbers that say so.
        tokens: unmasked tokens that were looked at.
        k1: mean of -d, nats.
        k3: mean of exp(d) - 1 - d, nats.
        cut: 1 - mean exp(d): the probability that the rollout's sampler cuts off.
        cut_error: its standard error.
        tail: which part of d^2 the largest hundredth of tokens holds; None for few tokens.
        stale: which part of d^2 is beyond that of the smallest lag; None without two lags.

    """

    cause: Cause
    sentence: str
    tokens: int
    k1: float
    k3: float
    cut: float
    cut_error: float
    tail: float | None
    stale: float | None


def report(log: Path | str | Iterable[Mapping[str, Any]], png: Path | str | None = None) -> Report:
    """Say what dominates in logged log-probs, and draw them.

    Args:
        log: a file with a JSON object a line, or such objects: one a sequence, see
            `flashquant.tis.logged`.
        png: where the picture goes; None for none.

    Raises:
        CorrectionError: the log cannot be read, or matplotlib is missing.

    """
    records = read(Path(log)) if isinstance(log, Path | str) else log
    logged = gathered_from(records)
    found = judged(logged)
    if png is not None:
        draw(logged, found.sentence, Path(png))
    return found


def judged(logged: Logged) -> Report:
    """The numbers, and what they say."""
    d = logged.log_ratio
    # A single ratio of thousands would be all there is to see in a mean of them.
    ratio = d.clamp(-20, 20).exp()
    numbers: dict[str, Any] = {
        "tokens": len(d),
        "k1": float(-d.mean()),
        "k3": float((ratio - 1 - d.clamp(-20, 20)).mean()),
        "cut": float(1 - ratio.mean()),
        "cut_error": float(ratio.std() / math.sqrt(len(d))) if len(d) > 1 else math.inf,
        "tail": _tail(d),
        "stale": _stale(d, logged.lag),
    }
    cause, because = _cause(numbers, logged.lag)
    sentence = f"Nothing: {because}" if cause == "nothing" else f"Mostly {cause}: {because}"
    return Report(cause=cause, sentence=sentence, **numbers)


def _cause(n: Mapping[str, Any], lag: Tensor | None) -> tuple[Cause, str]:
    apart = f"k3 {n['k3']:.2g} nats a token"
    if n["cut"] > max(5 * n["cut_error"], 0.5 * n["k1"], 1e-3):
        return "sampling truncation", (
            f"the trainer gives {n['cut']:.1%} of its probability to tokens that the rollout could "
            f"not have sampled (mean ratio {1 - n['cut']:.3f}, mean log ratio {-n['k1']:.3f}). "
            "Renormalize with masked_logprobs, or sample without top-k and top-p."
        )
    if n["k3"] < _AGREE:
        return "nothing", f"the policies agree as two bf16 engines do ({apart})."
    if n["stale"] is not None and n["stale"] > 0.5:
        return "stale weights", (
            f"{n['stale']:.0%} of the squared log ratio is beyond what the freshest rollouts have "
            f"({apart}). Allow less lag, or weigh by it."
        )
    if n["tail"] is not None and n["tail"] > 0.5:
        return "routing", (
            f"a hundredth of the tokens holds {n['tail']:.0%} of the squared log ratio ({apart}), "
            "as where experts are chosen differently. In a mixture of experts, replay the routing; "
            "in a dense model, look at these tokens."
        )
    unknown = "" if n["stale"] is not None else _cannot_tell(lag)
    return "quantization", (
        f"the difference is spread over all tokens and without a bias, as rounding is ({apart})."
        f"{unknown}"
    )


def _cannot_tell(lag: Tensor | None) -> str:
    if lag is not None and not bool(lag.any()):
        return ""  # all were fresh
    return " Stale weights look the same: log rollouts of different lag to tell them apart."


def _tail(d: Tensor) -> float | None:
    squares = d.square()
    total = float(squares.sum())
    if len(d) < _FEW or total == 0:
        return None
    return float(squares.topk(len(d) // 100).values.sum()) / total


def _stale(d: Tensor, lag: Tensor | None) -> float | None:
    if lag is None or len(lags := torch.unique(lag)) < 2:
        return None
    squares = d.square()
    fresh, everything = float(squares[lag == lags[0]].mean()), float(squares.mean())
    return None if everything == 0 else max(0.0, 1 - fresh / everything)
