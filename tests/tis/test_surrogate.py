"""The policy loss: against the formula in plain Python, with its gradient worked out by hand."""

from __future__ import annotations

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from flashquant.errors import CorrectionError
from flashquant.tis import Correction, Rejection, from_skyrl, icepop, loss
from tests.tis.batches import batches, of_ratios, tensors

REJECTING = Correction(
    cap=1.6,
    rejections=(
        Rejection("ratio", "mean", high=2.2),
        Rejection("ratio", "token", 0.4, 3.0, counted=True),
    ),
)
CORRECTIONS = [
    Correction(level=None),
    Correction(),
    Correction(level="sequence", cap=3.0),
    Correction(level="geometric", normalize=True),
    icepop(),
    REJECTING,
]
bounded = settings(deadline=None, max_examples=30)


def by_hand(logprobs, anchor, advantages, factor, counts, *, low, high, reduce):
    """The loss and its derivative by each log-prob, one token at a time."""
    total, slopes = 0.0, []
    rows = sum(any(row) for row in counts)
    tokens = sum(sum(row) for row in counts)
    for lp, an, adv, ws, cs in zip(logprobs, anchor, advantages, factor, counts, strict=True):
        share = tokens if reduce == "token-mean" else rows * sum(cs)
        row_slopes = []
        for new, old, a, w, counted in zip(lp, an, adv, ws, cs, strict=True):
            if not counted:
                row_slopes.append(0.0)
                continue
            delta = new - old
            ratio = math.exp(max(-20.0, min(20.0, delta)))
            worse = (a > 0 and ratio > 1 + high) or (a < 0 and ratio < 1 - low)
            held = max(1 - low, min(1 + high, ratio)) if worse else ratio
            total -= w * held * a / share
            flat = worse or abs(delta) > 20
            row_slopes.append(0.0 if flat else -w * ratio * a / share)
        slopes.append(row_slopes)
    return total, slopes


@st.composite
def problems(draw, *, near=True):
    """Log-probs of the policy, the trainer before it and the rollout; advantages; a mask."""
    batch = draw(batches(near=near))
    steps = st.integers(-6, 6)
    logprobs = [[token[0] + draw(steps) / 8 for token in row] for row in batch]
    advantages = [[draw(st.integers(-8, 8)) / 4 for _ in row] for row in batch]
    old, rollout, mask = tensors(batch)
    return torch.tensor(logprobs), old, rollout, torch.tensor(advantages), mask


def close(found: Tensor, expected) -> None:
    torch.testing.assert_close(
        found.detach().double(), torch.tensor(expected).double(), rtol=1e-5, atol=1e-6
    )


@pytest.mark.parametrize("reduce", ["token-mean", "sequence-mean"])
@pytest.mark.parametrize("correction", CORRECTIONS, ids=str)
@given(problem=problems())
@bounded
def test_value_and_gradient_are_those_of_the_formula(problem, correction, reduce):
    logprobs, old, rollout, advantages, mask = problem
    weights, keep_mask, _ = correction(old, rollout, mask)

    value, _ = loss(
        logprobs.requires_grad_(),
        old_logprobs=old,
        rollout_logprobs=rollout,
        advantages=advantages,
        mask=mask,
        correction=correction,
        reduce=reduce,
    )
    value.backward()

    expected, slopes = by_hand(
        logprobs.tolist(),
        old.tolist(),
        advantages.tolist(),
        weights.tolist(),
        keep_mask.tolist(),
        low=0.2,
        high=0.28,
        reduce=reduce,
    )
    close(value, expected)
    close(logprobs.grad, slopes)


@pytest.mark.parametrize("correction", CORRECTIONS, ids=str)
@given(problem=problems())
@bounded
def test_in_bypass_mode_no_weight_is_multiplied_and_rejections_hold(problem, correction):
    logprobs, _, rollout, advantages, mask = problem
    weights, keep_mask, _ = correction(logprobs, rollout, mask)

    value, _ = loss(
        logprobs.requires_grad_(),
        old_logprobs=None,
        rollout_logprobs=rollout,
        advantages=advantages,
        mask=mask,
        correction=correction,
        clip_high=0.2,
    )
    value.backward()

    expected, slopes = by_hand(
        logprobs.tolist(),
        rollout.tolist(),
        advantages.tolist(),
        [[float(w > 0) for w in row] for row in weights.tolist()],
        keep_mask.tolist(),
        low=0.2,
        high=0.2,
        reduce="token-mean",
    )
    close(value, expected)
    close(logprobs.grad, slopes)


def one(ratio_of_policy, ratio_of_trainer, advantage, **kwargs):
    """The loss of a single token."""
    rollout = torch.tensor([[math.log(0.1)]])
    old = rollout + math.log(ratio_of_trainer)
    value, metrics = loss(
        old + math.log(ratio_of_policy),
        old_logprobs=old,
        rollout_logprobs=rollout,
        advantages=torch.tensor([advantage]),
        mask=torch.ones(1, 1),
        correction=Correction(cap=2.0),
        **kwargs,
    )
    return value.item(), metrics


@pytest.mark.parametrize(
    ("policy", "trainer", "advantage", "expected"),
    [
        (1.0, 1.0, 3.0, -3.0),
        (1.1, 1.0, 1.0, -1.1),
        (2.0, 1.0, 1.0, -1.28),  # clipped: higher than it is lower
        (2.0, 1.0, -1.0, 2.0),  # the worse of the two is not clipped
        (0.5, 1.0, -1.0, 0.8),
        (0.5, 1.0, 1.0, -0.5),
        (1.1, 1.5, 1.0, -1.65),  # weighted
        (2.0, 3.0, 1.0, -2.56),  # the weight is cut to 2, the ratio to 1.28, each on its own
    ],
)
def test_one_token_by_hand(policy, trainer, advantage, expected):
    assert one(policy, trainer, advantage)[0] == pytest.approx(expected)


def test_the_weight_stands_outside_of_the_clip():
    # Inside, 1.5 * 1.1 would be clipped to 1.28.
    assert one(1.1, 1.5, 1.0)[0] == pytest.approx(-1.65)


def test_metrics_of_the_policy_by_hand():
    assert one(2.0, 1.0, 1.0)[1].clip_fraction == 1
    assert one(2.0, 1.0, -1.0)[1].clip_fraction == 0
    assert one(2.0, 1.0, 1.0)[1].policy_k1.item() == pytest.approx(-math.log(2))
    assert {"a/k3", "a/clip_fraction", "a/policy_k1"} < set(one(1.0, 1.0, 1.0)[1].to_dict("a/"))


def test_means_are_over_tokens_or_over_sequences():
    rollout, mask = torch.zeros(3, 3), torch.tensor([[1, 1, 1], [1, 0, 0], [0, 0, 0]])
    given = {
        "old_logprobs": None,
        "rollout_logprobs": rollout,
        "advantages": torch.tensor([1.0, 5.0, 9.0]),
        "mask": mask,
        "correction": Correction(),
    }

    tokens, _ = loss(rollout, **given)
    sequences, _ = loss(rollout, **given, reduce="sequence-mean")

    assert tokens == -(3 * 1 + 5) / 4
    assert sequences == -(1 + 5) / 2


def test_what_is_counted_stays_in_the_mean_and_what_is_not_leaves_it():
    rollout, old, mask = torch.zeros(1, 2), torch.tensor([[0.0, 3.0]]), torch.ones(1, 2)
    given = {
        "old_logprobs": old,
        "rollout_logprobs": rollout,
        "advantages": torch.ones(1),
        "mask": mask,
    }
    out = Rejection("ratio", high=5.0)

    counted, _ = loss(old, **given, correction=icepop())
    gone, _ = loss(old, **given, correction=Correction(rejections=(out,)))

    assert counted == -0.5
    assert gone == -1


@pytest.mark.parametrize("shape", [(2,), (2, 1), (2, 3)], ids=str)
def test_advantages_may_be_one_a_sequence(shape):
    rollout = torch.zeros(2, 3)

    value, _ = loss(
        rollout,
        old_logprobs=None,
        rollout_logprobs=rollout,
        advantages=torch.full(shape, 2.0),
        mask=torch.ones(2, 3),
        correction=Correction(),
    )

    assert value == -2


@pytest.mark.parametrize("bypass", [False, True])
def test_gradients_flow_through_the_policy_alone(bypass):
    logprobs, old, rollout = (torch.randn(2, 3, requires_grad=True) for _ in range(3))
    advantages = torch.randn(2, 3, requires_grad=True)

    value, metrics = loss(
        logprobs,
        old_logprobs=None if bypass else old,
        rollout_logprobs=rollout,
        advantages=advantages,
        mask=torch.ones(2, 3),
        correction=Correction(level="sequence"),
    )
    value.backward()

    assert logprobs.grad is not None
    assert old.grad is rollout.grad is advantages.grad is None
    assert not any(metric.requires_grad for metric in metrics.to_dict().values())


@given(problem=problems(), correction=st.sampled_from(CORRECTIONS), bypass=st.booleans())
@bounded
def test_nan_on_masked_tokens_reaches_neither_value_nor_gradient(problem, correction, bypass):
    def value_and_gradient(rubbish):
        logprobs, old, rollout, advantages, mask = (
            tensor.clone()
            if rubbish is None or tensor.dtype == torch.bool
            else tensor.masked_fill(~problem[-1], rubbish)
            for tensor in problem
        )
        value, _ = loss(
            logprobs.requires_grad_(),
            old_logprobs=None if bypass else old,
            rollout_logprobs=rollout,
            advantages=advantages,
            mask=mask,
            correction=correction,
        )
        value.backward()
        return value, logprobs.grad

    clean_value, clean_gradient = value_and_gradient(None)
    for rubbish in (math.nan, math.inf, -math.inf):
        value, gradient = value_and_gradient(rubbish)
        assert torch.equal(value, clean_value)
        assert torch.equal(gradient, clean_gradient)


def test_nan_on_masked_tokens_is_stopped_where_it_enters():
    """And not only at the end: torch's anomaly mode finds none on the way back."""
    nan, mask = torch.tensor([[-1.0, math.nan]]), torch.tensor([[1, 0]])

    value, _ = loss(
        nan.clone().requires_grad_(),
        old_logprobs=nan,
        rollout_logprobs=nan.clone(),
        advantages=nan,
        mask=mask,
        correction=Correction(),
    )

    with pytest.warns(UserWarning, match="Anomaly"), torch.autograd.detect_anomaly():
        value.backward()


@given(problem=problems(near=False), correction=st.sampled_from(CORRECTIONS))
@bounded
def test_the_loss_is_finite_however_far_the_policies_are_apart(problem, correction):
    logprobs, old, rollout, advantages, mask = problem

    value, _ = loss(
        logprobs.requires_grad_(),
        old_logprobs=old,
        rollout_logprobs=rollout,
        advantages=advantages,
        mask=mask,
        correction=correction,
    )
    value.backward()

    assert value.isfinite()
    assert logprobs.grad.isfinite().all()


def test_when_everything_is_rejected_the_loss_is_0_and_so_is_its_gradient():
    far, rollout, mask = of_ratios([100.0, 100.0])
    logprobs = far.clone().requires_grad_()

    value, _ = loss(
        logprobs,
        old_logprobs=far,
        rollout_logprobs=rollout,
        advantages=torch.ones(1),
        mask=mask,
        correction=Correction(rejections=(Rejection("ratio", "any", high=10.0),)),
    )
    value.backward()

    assert value == 0
    assert torch.equal(logprobs.grad, torch.zeros(1, 2))


def test_a_bf16_policy_has_a_float32_loss_and_a_bf16_gradient():
    logprobs = torch.zeros(1, 2, dtype=torch.bfloat16, requires_grad=True)

    value, _ = loss(
        logprobs,
        old_logprobs=None,
        rollout_logprobs=torch.zeros(1, 2),
        advantages=torch.ones(1),
        mask=torch.ones(1, 2),
        correction=Correction(),
    )
    value.backward()

    assert value.dtype == torch.float32
    assert logprobs.grad.tolist() == [[-0.5, -0.5]]


def test_counting_the_same_mismatch_twice_is_refused():
    rollout = torch.zeros(1, 2)

    with pytest.raises(CorrectionError, match="Give old_logprobs=None"):
        loss(
            rollout,
            old_logprobs=rollout,
            rollout_logprobs=rollout,
            advantages=torch.ones(1),
            mask=torch.ones(1, 2),
            correction=Correction(),
        )


def test_in_bypass_mode_a_mismatch_counts_once():
    rollout = torch.zeros(1, 1)
    given = {
        "rollout_logprobs": rollout,
        "advantages": torch.tensor([-1.0]),
        "mask": torch.ones(1, 1),
        "correction": from_skyrl(tis_ratio_type="token"),
    }

    value, _ = loss(rollout + math.log(1.5), old_logprobs=None, **given)

    assert value.item() == pytest.approx(1.5)  # not 1.5 ** 2


@pytest.mark.parametrize(
    ("wrong", "remedy"),
    [
        ({"advantages": torch.ones(3)}, r"advantages have shape \(3,\).*Give \[B, T\]"),
        ({"advantages": torch.ones(2, 2)}, r"advantages has shape \(2, 2\)"),
        ({"advantages": torch.tensor([1.0, math.nan])}, r"advantages\[1, 0\] is nan"),
        ({"logprobs": torch.full((2, 3), -math.inf)}, r"logprobs\[0, 0\] is -inf"),
        ({"old_logprobs": torch.full((2, 3), math.nan)}, r"trainer_logprobs\[0, 0\] is nan"),
        ({"reduce": "mean"}, "is one of .*token-mean"),
        ({"clip_low": 1.2}, "distances from 1"),
        ({"clip_high": -0.1}, "distances from 1"),
    ],
)
def test_what_cannot_be_meant_is_refused(wrong, remedy):
    given = {
        "logprobs": torch.zeros(2, 3),
        "old_logprobs": None,
        "rollout_logprobs": torch.zeros(2, 3),
        "advantages": torch.ones(2),
        "mask": torch.ones(2, 3),
        "correction": Correction(),
    }

    with pytest.raises(CorrectionError, match=remedy):
        loss(**given | wrong)
