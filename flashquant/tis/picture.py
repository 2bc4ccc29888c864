"""The picture of a mismatch: probabilities, log ratios by position and by entropy, sample sizes."""

from __future__ import annotations

import textwrap
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from flashquant.errors import CorrectionError
from flashquant.tis.logged import Logged

_BANDS = (0.01, 0.1, 0.5, 0.9, 0.99)
_BINS = 24


def draw(logged: Logged, sentence: str, path: Path) -> None:
    """Draw into a PNG, under the sentence that says what is to be seen.

    Raises:
        CorrectionError: matplotlib is not installed.

    """
    try:
        from matplotlib.figure import Figure
        from matplotlib.ticker import MaxNLocator
    except ImportError as missing:
        raise CorrectionError(
            f"matplotlib is needed to draw ({missing}): install flashquant[bench], or ask for the "
            "report alone"
        ) from missing
    figure: Any = Figure(figsize=(12, 8.5), layout="constrained")
    (scatter, by_position), (by_entropy, sizes) = figure.subplots(2, 2)
    _probabilities(figure, scatter, logged)
    _bands(by_position, logged.position.double(), logged.log_ratio, "position in the sequence")
    if logged.entropy is not None:
        _bands(by_entropy, logged.entropy, logged.log_ratio, "entropy of the trainer, nats")
    else:
        _bands(by_entropy, -logged.rollout, logged.log_ratio, "-log p of the rollout, nats")
        by_entropy.set_title("no entropies were logged", fontsize="small")
    _sizes(sizes, logged)
    sizes.xaxis.set_major_locator(MaxNLocator(integer=True))
    figure.suptitle("\n".join(textwrap.wrap(sentence, 130)), fontsize="medium")
    figure.savefig(path, dpi=110)


def _probabilities(figure: Any, axes: Any, logged: Logged) -> None:
    drawn = axes.hexbin(
        logged.rollout.exp().tolist(),
        logged.trainer.exp().tolist(),
        gridsize=50,
        extent=(0, 1, 0, 1),
        bins="log",
        mincnt=1,
        cmap="viridis",
    )
    axes.plot([0, 1], [0, 1], color="black", linewidth=0.8)
    axes.set_xlabel("probability, rollout")
    axes.set_ylabel("probability, trainer")
    figure.colorbar(drawn, ax=axes, label="tokens")


def _bands(axes: Any, by: Tensor, log_ratio: Tensor, label: str) -> None:
    """Quantiles of the log ratio over parts with as many tokens each."""
    order = by.argsort(stable=True)
    middles, rows = [], []
    for part in order.tensor_split(min(_BINS, max(1, len(order) // 50))):
        middles.append(float(by[part].median()))
        found = torch.quantile(log_ratio[part], torch.tensor(_BANDS, dtype=torch.float64))
        rows.append(found.tolist())
    low, under, middle, over, high = zip(*rows, strict=True)
    axes.fill_between(middles, low, high, color="C0", alpha=0.15, label="1 % to 99 %")
    axes.fill_between(middles, under, over, color="C0", alpha=0.35, label="10 % to 90 %")
    axes.plot(middles, middle, color="C0", label="median")
    axes.axhline(0, color="black", linewidth=0.8)
    axes.set_xlabel(label)
    axes.set_ylabel("log ratio, trainer less rollout")
    axes.legend(fontsize="small")


def _sizes(axes: Any, logged: Logged) -> None:
    steps = torch.unique(logged.step)
    tokens, sequences = [], []
    for step in steps:
        here = logged.step == step
        tokens.append(_size(logged.log_ratio[here]))
        _, of = torch.unique(logged.sequence[here], return_inverse=True)
        sums = torch.zeros(int(of.max()) + 1, dtype=torch.float64)
        sequences.append(_size(sums.index_add_(0, of, logged.log_ratio[here])))
    axes.plot(steps.tolist(), tokens, "o-", markersize=3, label="of tokens")
    axes.plot(steps.tolist(), sequences, "s-", markersize=3, label="of sequences")
    axes.set_ylim(0, 1.03)
    axes.set_xlabel("step")
    axes.set_ylabel("effective sample size, a part of all")
    axes.legend(fontsize="small")


def _size(log_weight: Tensor) -> float:
    """(sum w)^2 / (n sum w^2), in logarithms."""
    log_size = 2 * log_weight.logsumexp(0) - (2 * log_weight).logsumexp(0)
    return float(log_size.exp()) / len(log_weight)
