"""The formulas once more, from their definitions: plain Python floats, one token at a time.

Nothing here knows of `flashquant`. A batch is a list of rows, a row a list of tokens, and a token
(trainer log-prob, rollout log-prob, whether it counts).
"""

from __future__ import annotations

import math
from dataclasses import dataclass

Token = tuple[float, float, bool]
Batch = list[list[Token]]

BOUND = 20.0


def exp(x: float, bound: float = BOUND) -> float:
    return math.exp(max(-bound, min(bound, x)))


def clamp(x: float, low: float | None, high: float | None) -> float:
    if low is not None and x < low:
        return low
    return high if high is not None and x > high else x


def within(x: float, low: float | None, high: float | None) -> bool:
    return (low is None or x >= low) and (high is None or x <= high)


def deltas(row: list[Token], seen: list[bool] | None = None) -> list[float]:
    """log r of the tokens that count (of those that are also seen)."""
    seen = seen or [True] * len(row)
    return [t - r for (t, r, counts), sees in zip(row, seen, strict=True) if counts and sees]


def product_ratio(row: list[Token], seen: list[bool] | None = None) -> float:
    return exp(sum(deltas(row, seen)))


def geometric_ratio(row: list[Token], seen: list[bool] | None = None) -> float:
    found = deltas(row, seen)
    return exp(sum(found) / len(found)) if found else 1.0


def k(which: str, delta: float) -> float:
    delta = max(-BOUND, min(BOUND, delta))
    if which == "k1":
        return -delta
    if which == "k2":
        return delta * delta / 2
    return math.exp(delta) - 1 - delta


def average(values: list[float]) -> float:
    return sum(values) / len(values) if values else 0.0


@dataclass
class Verdict:
    """For each place of the batch: the factor on its loss, and whether the loss counts it."""

    factor: list[list[float]]
    counts: list[list[bool]]


def statistic(which: str, over: str, row: list[Token], seen: list[bool]) -> float:
    """Of a whole row; "any" is the caller's."""
    found = deltas(row, seen)
    if which == "ratio":
        return product_ratio(row, seen) if over == "sum" else geometric_ratio(row, seen)
    total = sum(k(which, d) for d in found)
    return total if over == "sum" else total / max(len(found), 1)


def rejected(which, over, low, high, row, seen) -> list[bool]:
    """Which tokens of the row a rejection takes."""

    def own(t, r):
        return exp(t - r) if which == "ratio" else k(which, t - r)

    alone = [
        counts and sees and not within(own(t, r), low, high)
        for (t, r, counts), sees in zip(row, seen, strict=True)
    ]
    if over == "token":
        return alone
    if over == "any":
        return [any(alone)] * len(row)
    return [not within(statistic(which, over, row, seen), low, high)] * len(row)


def corrected(
    batch: Batch,
    *,
    level: str | None,
    cap: float | None = None,
    floor: float | None = None,
    rejections: list[tuple] = (),
    chained: bool = False,
    normalize: bool = False,
) -> Verdict:
    """`rejections` are (statistic, over, low, high, counted)."""
    raw, zero, gone = [], [], []
    for row in batch:
        counts = [token[2] for token in row]
        row_zero, row_gone = [False] * len(row), [False] * len(row)
        for which, over, low, high, counted in rejections:
            seen = counts
            if chained:
                seen = [
                    c and not z and not g
                    for c, z, g in zip(counts, row_zero, row_gone, strict=True)
                ]
            taken = rejected(which, over, low, high, row, seen)
            for i, takes in enumerate(taken):
                if takes and counted:
                    row_zero[i] = True
                elif takes:
                    row_gone[i] = True
        seen = counts
        if chained:
            seen = [
                c and not z and not g for c, z, g in zip(counts, row_zero, row_gone, strict=True)
            ]
        row_raw = []
        for t, r, count in row:
            if level is None:
                row_raw.append(1.0)
            elif level == "token":
                row_raw.append(clamp(exp(t - r), floor, cap) if count else 0.0)
            elif level == "sequence":
                row_raw.append(clamp(product_ratio(row, seen), floor, cap))
            else:
                row_raw.append(clamp(geometric_ratio(row, seen), floor, cap))
        raw.append(row_raw)
        zero.append(row_zero)
        gone.append(row_gone)
    divisor = 1.0
    if normalize:
        found = []
        for row, row_raw, row_zero in zip(batch, raw, zero, strict=True):
            mine = [
                0.0 if z else w for (_, _, c), w, z in zip(row, row_raw, row_zero, strict=True) if c
            ]
            if level == "token":
                found += mine
            elif mine:
                found.append(max(mine))
        divisor = average(found) or 1.0
    factor, left = [], []
    for row, row_raw, row_zero, row_gone in zip(batch, raw, zero, gone, strict=True):
        factor.append(
            [
                w / divisor if c and not z and not g else 0.0
                for (_, _, c), w, z, g in zip(row, row_raw, row_zero, row_gone, strict=True)
            ]
        )
        left.append([c and not g for (_, _, c), g in zip(row, row_gone, strict=True)])
    return Verdict(factor, left)


def measured(batch: Batch, level: str | None, factor: list[list[float]]) -> dict[str, float]:
    """The metrics that need nothing but the ratios and the weights."""
    tokens = [delta for row in batch for delta in deltas(row)]
    rows = [
        (row, row_factor)
        for row, row_factor in zip(batch, factor, strict=True)
        if any(token[2] for token in row)
    ]
    per_token = [w for row, ws in rows for token, w in zip(row, ws, strict=True) if token[2]]
    if level == "sequence":
        ratios, weights = [product_ratio(row) for row, _ in rows], [max(ws) for _, ws in rows]
    elif level == "geometric":
        ratios, weights = [geometric_ratio(row) for row, _ in rows], [max(ws) for _, ws in rows]
    else:
        ratios, weights = [exp(delta) for delta in tokens], per_token
    squares = len(weights) * sum(w * w for w in weights)
    return {
        "tokens": len(tokens),
        "k1": average([-delta for delta in tokens]),
        "k3": average([k("k3", delta) for delta in tokens]),
        "chi2": average([ratio * ratio - 1 for ratio in ratios]),
        "ess": sum(weights) ** 2 / squares if squares else 0.0,
        "ratio_max": max(ratios, default=0.0),
        "weight_mean": average(weights),
        "rejected_fraction": average([float(w == 0) for w in per_token]),
        "perplexity_ratio": average([1 / geometric_ratio(row) for row, _ in rows]),
    }
