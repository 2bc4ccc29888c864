"""A batch in micro-batches, on two ranks, is the batch: loss, gradient, weights and metrics."""

from __future__ import annotations

import math
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, multiprocessing
from torch import distributed as dist

from flashquant.errors import CorrectionError
from flashquant.tis import Correction, LossMetrics, Rejection, effective_sample_size, loss
from tests.tis.batches import batches, tensors

CORRECTIONS = [
    Correction(),
    Correction(normalize=True),
    Correction(level="sequence", cap=3.0, normalize=True),
    Correction(
        level="geometric",
        normalize=True,
        rejections=(
            Rejection("ratio", "mean", high=2.2),
            Rejection("ratio", "token", 0.4, 3.0, counted=True),
        ),
    ),
    Correction(level=None, rejections=(Rejection("k3", "any", high=1e-9),)),  # nearly everything
]
REDUCE = ["token-mean", "sequence-mean"]
bounded = settings(deadline=None, max_examples=30)
Whole = dict[str, Any]


def problem_of(seed: int, rows: int = 6, columns: int = 5) -> Whole:
    dice = torch.Generator().manual_seed(seed)
    old = -torch.rand(rows, columns, generator=dice) * 3
    return {
        "logprobs": old + torch.randn(rows, columns, generator=dice) / 4,
        "old_logprobs": old,
        "rollout_logprobs": old + torch.randn(rows, columns, generator=dice) / 2,
        "advantages": torch.randn(rows, generator=dice),
        "mask": torch.rand(rows, columns, generator=dice) > 0.3,
    }


def part(problem: Whole, rows: slice) -> Whole:
    return {name: value[rows] for name, value in problem.items()}


def computed(problem: Whole, **how: Any) -> tuple[Tensor, Tensor, LossMetrics]:
    leaf = problem["logprobs"].clone().requires_grad_()
    value, metrics = loss(**problem | {"logprobs": leaf}, **how)
    value.backward()
    return value.detach(), leaf.grad, metrics


def denominator_of(correction: Correction, problem: Whole, reduce: str) -> Any:
    return correction.denominator(
        problem["old_logprobs"], problem["rollout_logprobs"], problem["mask"], reduce=reduce
    )


def assert_same(found: LossMetrics, expected: LossMetrics) -> None:
    wanted = expected.to_dict()
    for name, value in found.to_dict().items():
        torch.testing.assert_close(value, wanted[name], rtol=2e-5, atol=1e-6, msg=name)


@pytest.mark.parametrize("reduce", REDUCE)
@pytest.mark.parametrize("correction", CORRECTIONS, ids=str)
@given(batch=batches(near=True), cut=st.integers(0, 4), seed=st.integers(0, 99))
@bounded
def test_micro_batches_add_up_to_the_batch(batch, cut, seed, correction, reduce):
    old, rollout, mask = tensors(batch)
    dice = torch.Generator().manual_seed(seed)
    problem = {
        "logprobs": old + torch.randn(old.shape, generator=dice) / 4,
        "old_logprobs": old,
        "rollout_logprobs": rollout,
        "advantages": torch.randn(len(old), generator=dice),
        "mask": mask,
    }
    value, gradient, metrics = computed(problem, correction=correction, reduce=reduce)

    parts = [part(problem, rows) for rows in (slice(0, cut), slice(cut, None))]
    whole = sum(denominator_of(correction, each, reduce) for each in parts)
    pieces = [
        computed(each, correction=correction, reduce=reduce, denominator=whole) for each in parts
    ]

    torch.testing.assert_close(sum(piece[0] for piece in pieces), value)
    torch.testing.assert_close(torch.cat([piece[1] for piece in pieces]), gradient)
    assert_same(LossMetrics.merge([piece[2] for piece in pieces]), metrics)


def on_two_ranks(work: Callable[[], Any]) -> None:
    """Each rank fails with what it asserts."""
    with tempfile.TemporaryDirectory() as folder:
        multiprocessing.spawn(_rank, (work, Path(folder, "meet")), nprocs=2)


def _rank(rank: int, work: Callable[[], Any], meet: Path) -> None:
    dist.init_process_group("gloo", init_method=f"file://{meet}", rank=rank, world_size=2)
    try:
        work()
    finally:
        dist.destroy_process_group()


def _ranks_are_the_batch() -> None:
    """Two ranks of unlike size, each in two micro-batches, beside one process."""
    mine = [(slice(0, 1), slice(1, 4)), (slice(4, 6), slice(6, 6))][dist.get_rank()]
    for seed, correction in enumerate(CORRECTIONS):
        for reduce in REDUCE:
            problem = problem_of(seed)
            value, gradient, metrics = computed(problem, correction=correction, reduce=reduce)

            parts = [part(problem, rows) for rows in mine]
            local = sum(denominator_of(correction, each, reduce) for each in parts)
            whole = local.reduce()
            found = [
                computed(each, correction=correction, reduce=reduce, denominator=whole)
                for each in parts
            ]

            total = torch.stack([piece[0] for piece in found]).sum()
            dist.all_reduce(total)
            torch.testing.assert_close(total, value)
            for rows, piece in zip(mine, found, strict=True):
                torch.testing.assert_close(piece[1], gradient[rows])
            assert_same(LossMetrics.merge([piece[2] for piece in found]).reduce(), metrics)
            everywhere = [problem[n] for n in ("old_logprobs", "rollout_logprobs", "mask")]
            here = slice(mine[0].start, mine[1].stop)
            torch.testing.assert_close(
                effective_sample_size(*(tensor[here] for tensor in everywhere)),
                _alone(*everywhere),
            )


def _alone(old: Tensor, rollout: Tensor, mask: Tensor) -> Tensor:
    rows = mask.any(-1)
    weights = ((old - rollout) * mask).sum(-1)[rows].double().exp()
    return (weights.sum() ** 2 / (len(weights) * weights.square().sum())).float()


def test_two_ranks_are_one_process_with_the_batch():
    on_two_ranks(_ranks_are_the_batch)


def test_without_ranks_a_reduction_is_what_is_here():
    problem = problem_of(0)
    _, _, metrics = computed(problem, correction=Correction())

    assert_same(metrics.reduce(), metrics)


def test_a_number_may_be_the_denominator():
    problem = problem_of(1)
    value, gradient, metrics = computed(problem, correction=Correction())

    for number in (7.0, torch.tensor(7.0)):
        other, others, _ = computed(problem, correction=Correction(), denominator=number)
        torch.testing.assert_close(other * 7, value * metrics.kept)
        torch.testing.assert_close(others * 7, gradient * metrics.kept)


@pytest.mark.parametrize("correction", CORRECTIONS, ids=str)
@pytest.mark.parametrize("reduce", REDUCE)
def test_nothing_left_anywhere_is_loss_0_and_no_nan(correction, reduce):
    problem = problem_of(2) | {"mask": torch.zeros(6, 5, dtype=torch.bool)}

    value, gradient, metrics = computed(
        problem,
        correction=correction,
        reduce=reduce,
        denominator=denominator_of(correction, problem, reduce).reduce(),
    )

    assert value == 0
    assert torch.equal(gradient, torch.zeros(6, 5))
    together = LossMetrics.merge([metrics, metrics]).to_dict()
    assert all(math.isfinite(metric) for metric in together.values())


@pytest.mark.parametrize(
    ("wrong", "remedy"),
    [
        ({"denominator": 0}, "above 0: a count"),
        ({"denominator": -1.0}, "above 0: a count"),
        ({"denominator": 5, "correction": Correction(normalize=True)}, "mean weight of all"),
    ],
)
def test_a_denominator_that_cannot_be_meant_is_refused(wrong, remedy):
    with pytest.raises(CorrectionError, match=remedy):
        computed(problem_of(0), **{"correction": Correction()} | wrong)
