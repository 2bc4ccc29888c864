"""Weights, kept tokens and metrics: golden values by hand, the formulas once more, and laws."""

from __future__ import annotations

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from flashquant.errors import CorrectionError
from flashquant.tis import (
    Correction,
    Rejection,
    icepop,
    masked,
    truncated_importance_weights,
)
from tests.tis.batches import batches, of_ratios, tensors
from tests.tis.derived import corrected, measured

LEVELS = ["token", "sequence", "geometric"]
LN2 = math.log(2)

bounded = settings(deadline=None, max_examples=40)


@st.composite
def rejections(draw):
    statistic = draw(st.sampled_from(["ratio", "k1", "k2", "k3"]))
    bounds = {
        "ratio": [(0.4, 2.2), (None, 3.3), (0.7, None)],
        "k1": [(-0.7, 0.3), (None, 0.21)],
        "k2": [(None, 0.3)],
        "k3": [(None, 0.1), (None, 1.1)],
    }
    low, high = draw(st.sampled_from(bounds[statistic]))
    over = draw(st.sampled_from(["token", "any", "sum", "mean"]))
    return Rejection(statistic, over, low, high, counted=draw(st.booleans()))


@st.composite
def corrections(draw):
    level = draw(st.sampled_from([None, *LEVELS]))
    return Correction(
        level=level,
        cap=draw(st.sampled_from([None, 1.3, 2.0, 30.0])),
        floor=draw(st.sampled_from([None, 0.25, 0.9])),
        rejections=tuple(draw(st.lists(rejections(), max_size=2))),
        chained=draw(st.booleans()),
        normalize=level is not None and draw(st.booleans()),
    )


def again(correction, batch):
    """What the definitions say of this correction."""
    return corrected(
        batch,
        level=correction.level,
        cap=correction.cap,
        floor=correction.floor,
        rejections=[(r.statistic, r.over, r.low, r.high, r.counted) for r in correction.rejections],
        chained=correction.chained,
        normalize=correction.normalize,
    )


def close(found, expected, **kwargs):
    torch.testing.assert_close(found.double(), torch.tensor(expected).double(), **kwargs)


# By hand: ratios 2, 1/2, 4 with a tool's token between them.
HAND = of_ratios([2.0, 0.5, None, 4.0])


def test_a_tokens_weight_is_its_ratio_up_to_the_cap():
    weights, keep_mask, _ = truncated_importance_weights(*HAND, cap=2.5)

    close(weights, [[2.0, 0.5, 0.0, 2.5]])
    assert keep_mask.tolist() == [[True, True, False, True]]


def test_a_sequences_weight_is_the_product_up_to_the_cap():
    weights, _, _ = truncated_importance_weights(*HAND, cap=3.0, level="sequence")
    uncapped, _, _ = truncated_importance_weights(*HAND, cap=5.0, level="sequence")

    close(weights, [[3.0, 3.0, 0.0, 3.0]])
    close(uncapped, [[4.0, 4.0, 0.0, 4.0]])


def test_a_geometric_weight_is_the_root_of_the_product():
    weights, _, _ = truncated_importance_weights(*HAND, level="geometric")

    close(weights, [[4 ** (1 / 3), 4 ** (1 / 3), 0.0, 4 ** (1 / 3)]])


def test_the_default_is_flashrls_formula():
    trainer, rollout = torch.randn(2, 5), torch.randn(2, 5)

    weights, _, _ = truncated_importance_weights(trainer, rollout, torch.ones(2, 5))

    close(weights, torch.exp(trainer - rollout).clamp(max=2.0).tolist())


def test_metrics_by_hand():
    metrics = truncated_importance_weights(*HAND, cap=2.0).metrics

    # weights 2, 1/2, 2; log r sums to ln 4
    assert metrics.tokens == 3
    close(metrics.k1, -2 * LN2 / 3)
    close(metrics.k3, (1 - 0.5 + 3 - 2 * LN2) / 3)
    close(metrics.chi2, (4 + 0.25 + 16) / 3 - 1)
    close(metrics.ess, 4.5**2 / (3 * 8.25))
    close(metrics.ratio_max, 4.0)
    close(metrics.weight_mean, 1.5)
    close(metrics.clipped_fraction, 1 / 3)
    close(metrics.rejected_fraction, 0.0)
    close(metrics.perplexity_ratio, 4 ** (-1 / 3))


def test_metrics_of_sequences_by_hand():
    batch = of_ratios([2.0, 4.0], [0.5, None], [None, None])

    metrics = truncated_importance_weights(*batch, cap=3.0, level="sequence").metrics

    # sequences of ratio 8 and 1/2, of weight 3 and 1/2; the empty one is none
    close(metrics.chi2, (64 + 0.25) / 2 - 1)
    close(metrics.ess, 3.5**2 / (2 * 9.25))
    close(metrics.ratio_max, 8.0)
    close(metrics.weight_mean, 1.75)
    close(metrics.clipped_fraction, 0.5)
    close(metrics.perplexity_ratio, (8**-0.5 + 2) / 2)


def test_icepop_zeroes_what_is_out_of_bounds_and_counts_it():
    weights, keep_mask, metrics = icepop()(*of_ratios([0.4, 0.6, 4.0, 6.0]))

    close(weights, [[0.0, 0.6, 4.0, 0.0]])
    assert keep_mask.all()
    close(metrics.rejected_fraction, 0.5)
    close(metrics.clipped_fraction, 0.0)


def test_bounds_are_inclusive():
    half = torch.tensor([[0.5, -0.5]])
    both = Rejection("k1", low=-0.5, high=0.5, counted=True)

    kept = Correction(rejections=(both,))(half, torch.zeros(1, 2), torch.ones(1, 2))

    assert (kept.weights > 0).all()


@pytest.mark.parametrize(
    ("level", "expected"),
    [("token", [[2.0, 0.0]]), ("sequence", [[0.0, 0.0]]), ("geometric", [[2**1.5] * 2])],
)
def test_masked_importance_sampling_judges_the_ratio_of_its_level(level, expected):
    weights, _, _ = masked(0.5, 3.0, level=level)(*of_ratios([2.0, 4.0]))

    close(weights, expected)


@pytest.mark.parametrize(
    ("rejection", "kept"),
    [
        (Rejection("ratio", "mean", 0.99, 1.01), [True, False]),
        (Rejection("ratio", "sum", 0.5, 3.9), [True, False]),
        (Rejection("k1", "mean", -0.01, 0.01), [True, False]),
        # k2 of 2 and 1/2 is ln(2)^2 / 2 = 0.24; k3 is 0.307 and 0.193
        (Rejection("k2", "mean", high=0.23), [False, False]),
        (Rejection("k2", "mean", high=0.25), [True, True]),
        (Rejection("k3", "mean", high=0.26), [True, False]),
        (Rejection("k3", "sum", high=0.49), [False, False]),
        (Rejection("k3", "any", high=0.3), [False, False]),
        (Rejection("ratio", "any", low=0.6), [False, True]),
    ],
    ids=str,
)
def test_a_sequence_is_rejected_as_a_whole_and_leaves_the_mean(rejection, kept):
    batch = of_ratios([2.0, 0.5, None], [2.0, 2.0, None])

    weights, keep_mask, _ = Correction(rejections=(rejection,))(*batch)

    assert keep_mask.tolist() == [[kept[0]] * 2 + [False], [kept[1]] * 2 + [False]]
    assert ((weights > 0) == keep_mask).all()


def test_a_veto_is_by_one_token():
    batch = of_ratios([1.0, 1.0, 1e-5], [1.0, 1.0, 1e-3])

    _, keep_mask, metrics = Correction(rejections=(Rejection("ratio", "any", 1e-4),))(*batch)

    assert keep_mask.tolist() == [[False] * 3, [True] * 3]
    close(metrics.rejected_fraction, 0.5)
    close(metrics.ess, (2 + 1e-3) ** 2 / (6 * (2 + 1e-6)))


def test_normalized_token_weights_have_mean_one():
    weights, _, metrics = Correction(cap=2.0, normalize=True)(*HAND)

    close(weights, [[2 / 1.5, 0.5 / 1.5, 0.0, 2 / 1.5]])
    close(metrics.weight_mean, 1.0)


def test_normalized_sequence_weights_count_each_sequence_once():
    batch = of_ratios([2.0, 1.0, 1.0], [4.0, None, None], [None, None, None])

    weights, _, _ = Correction(level="sequence", cap=None, normalize=True)(*batch)

    close(weights, [[2 / 3] * 3, [4 / 3, 0.0, 0.0], [0.0] * 3])


def test_chained_sequences_are_judged_by_the_tokens_that_are_left():
    batch = of_ratios([8.0, 1.1])
    both = (
        Rejection("ratio", high=2.0, counted=True),
        Rejection("ratio", "sum", high=2.0, counted=True),
    )

    apart = Correction(level="sequence", cap=5.0, rejections=both)(*batch)
    chained = Correction(level="sequence", cap=5.0, rejections=both, chained=True)(*batch)

    close(apart.weights, [[0.0, 0.0]])
    close(chained.weights, [[0.0, 1.1]])


@given(batches(), corrections())
@settings(deadline=None, max_examples=150)
def test_weights_and_kept_tokens_are_those_of_the_definitions(batch, correction):
    weights, keep_mask, _ = correction(*tensors(batch))

    expected = again(correction, batch)
    close(weights, expected.factor, rtol=1e-5, atol=1e-8)
    assert keep_mask.tolist() == expected.counts


@given(batches(), corrections())
@settings(deadline=None, max_examples=150)
def test_metrics_are_those_of_the_definitions(batch, correction):
    found = correction(*tensors(batch)).metrics.to_dict()

    for name, value in measured(batch, correction.level, again(correction, batch).factor).items():
        close(
            found[name], value, rtol=2e-5, atol=2e-6, msg=lambda text, name=name: f"{name}: {text}"
        )


@given(batches(), st.sampled_from(LEVELS), st.sampled_from([0.75, 1.0, 2.0, 5.0]))
@bounded
def test_weights_lie_between_0_and_the_cap(batch, level, cap):
    weights = Correction(level=level, cap=cap)(*tensors(batch)).weights

    assert weights.min() >= 0
    assert weights.max() <= cap


@given(batches(), corrections(), st.sampled_from([math.nan, math.inf, -math.inf, 7.0]))
@bounded
def test_what_stands_on_masked_tokens_changes_nothing(batch, correction, rubbish):
    trainer, rollout, mask = tensors(batch)

    before = correction(trainer, rollout, mask)
    after = correction(
        trainer.masked_fill(~mask, rubbish), rollout.masked_fill(~mask, -rubbish), mask
    )

    assert torch.equal(before.weights, after.weights)
    assert torch.equal(before.keep_mask, after.keep_mask)
    assert before.metrics.to_dict() == after.metrics.to_dict()


@given(batches(), corrections(), st.randoms(use_true_random=False))
@bounded
def test_the_order_of_sequences_changes_nothing(batch, correction, random):
    order = list(range(len(batch)))
    random.shuffle(order)

    weights, keep_mask, metrics = correction(*tensors(batch))
    shuffled = correction(*tensors([batch[i] for i in order]))

    torch.testing.assert_close(weights[order], shuffled.weights)
    assert torch.equal(keep_mask[order], shuffled.keep_mask)
    for name, value in metrics.to_dict().items():
        torch.testing.assert_close(value, shuffled.metrics.to_dict()[name], rtol=1e-5, atol=1e-6)


@given(batches(), corrections(), st.integers(0, 3), st.integers(0, 2))
@bounded
def test_padding_changes_nothing(batch, correction, columns, rows):
    width = len(batch[0])
    padded = [[*row, *[(-1.0, -9.0, False)] * columns] for row in batch]
    padded += [[(-1.0, -9.0, False)] * (width + columns)] * rows

    weights, keep_mask, metrics = correction(*tensors(batch))
    more = correction(*tensors(padded))

    torch.testing.assert_close(weights, more.weights[: len(batch), :width])
    assert torch.equal(keep_mask, more.keep_mask[: len(batch), :width])
    assert not more.keep_mask[len(batch) :].any()
    for name, value in metrics.to_dict().items():
        torch.testing.assert_close(value, more.metrics.to_dict()[name], rtol=1e-5, atol=1e-6)


@given(batches(), corrections())
@bounded
def test_on_policy_every_weight_is_1_and_nothing_is_rejected(batch, correction):
    _, rollout, mask = tensors(batch)

    weights, keep_mask, metrics = correction(rollout, rollout, mask)

    if correction.level is None or (correction.floor or 0) <= 1 <= (correction.cap or 1):
        assert torch.equal(weights, mask.float())
    assert torch.equal(keep_mask, mask)
    assert metrics.k1 == metrics.k3 == metrics.chi2 == metrics.rejected_fraction == 0
    if mask.any():
        assert metrics.ess == metrics.ratio_max == metrics.perplexity_ratio == 1


@given(batches(), st.sampled_from(LEVELS), st.floats(0.5, 4), st.floats(1, 3))
@bounded
def test_a_larger_cap_makes_no_weight_smaller(batch, level, cap, times):
    tight = Correction(level=level, cap=cap)(*tensors(batch)).weights
    loose = Correction(level=level, cap=cap * times)(*tensors(batch)).weights

    assert (loose >= tight).all()


@given(batches(), corrections())
@bounded
def test_bf16_is_taken_at_its_exact_value(batch, correction):
    as_bf16 = tensors(batch, torch.bfloat16)
    exact = correction(as_bf16[0].float(), as_bf16[1].float(), as_bf16[2])

    found = correction(*as_bf16)

    assert found.weights.dtype == torch.float32
    assert torch.equal(found.weights, exact.weights)
    assert found.metrics.to_dict() == exact.metrics.to_dict()


def test_bf16_is_subtracted_in_float32():
    trainer = torch.tensor([[-3 / 256]], dtype=torch.bfloat16)
    rollout = torch.tensor([[-8.0]], dtype=torch.bfloat16)  # their difference would be 8 in bf16

    weights = Correction(cap=None)(trainer, rollout, torch.ones(1, 1)).weights

    close(weights, [[math.exp(8 - 3 / 256)]], rtol=1e-5, atol=0)


def test_long_sequences_are_summed_in_float32():
    rollout = torch.full((1, 2048), -1.0, dtype=torch.bfloat16)
    trainer = rollout + 2**-7  # one step of bf16; 2048 of them in bf16 would stop at 2 or so

    weights = Correction(level="sequence", cap=None)(trainer, rollout, torch.ones(1, 2048)).weights

    close(weights[0, 0], math.exp(16), rtol=1e-5, atol=0)


def test_metrics_of_a_large_batch_as_far_off_as_can_be_stay_in_float32():
    far = torch.full((2048, 1024), 99.0)

    metrics = Correction(cap=None, safety_bound=30)(far, 0 * far, 0 * far + 1).metrics

    assert metrics.ess.item() == pytest.approx(1)
    assert metrics.chi2.isfinite()


def test_the_safety_bound_holds_for_what_is_exponentiated():
    far = torch.full((1, 3), 15.0), torch.zeros(1, 3), torch.ones(1, 3)

    token = Correction(cap=None)(*far)
    sequence = Correction(level="sequence", cap=None)(*far)
    geometric = Correction(level="geometric", cap=None)(*far)

    close(token.weights, [[math.exp(15)] * 3], rtol=1e-5, atol=0)
    close(sequence.weights, [[math.exp(20)] * 3], rtol=1e-5, atol=0)
    close(geometric.weights, [[math.exp(15)] * 3], rtol=1e-5, atol=0)


@given(batches(), corrections())
@bounded
def test_everything_is_detached(batch, correction):
    trainer, rollout, mask = tensors(batch)

    weights, keep_mask, metrics = correction(
        trainer.requires_grad_(), rollout.requires_grad_(), mask
    )

    assert not weights.requires_grad
    assert not keep_mask.requires_grad
    assert not any(value.requires_grad for value in metrics.to_dict().values())
    assert {value.dtype for value in metrics.to_dict().values()} == {torch.float32}
    assert {value.shape for value in metrics.to_dict().values()} == {()}


@pytest.mark.parametrize("shape", [(0, 0), (0, 3), (2, 0), (2, 3)], ids=str)
@pytest.mark.parametrize("level", [None, *LEVELS])
def test_nothing_to_correct_is_weight_0_and_no_nan(shape, level):
    correction = Correction(level=level, rejections=(Rejection("k3", "mean", high=1.0),))
    nan = torch.full(shape, math.nan)

    weights, keep_mask, metrics = correction(nan, nan, torch.zeros(shape))

    assert torch.equal(weights, torch.zeros(shape))
    assert not keep_mask.any()
    assert all(value == 0 for value in metrics.to_dict().values())


@pytest.mark.parametrize("mask_dtype", [torch.bool, torch.int64, torch.float32, torch.bfloat16])
def test_a_mask_may_be_of_any_type(mask_dtype):
    trainer, rollout, mask = HAND

    found = Correction()(trainer, rollout, mask.to(mask_dtype))

    assert torch.equal(found.weights, Correction()(*HAND).weights)
    assert found.keep_mask.dtype == torch.bool


def test_metrics_go_by_name_with_a_prefix():
    names = Correction()(*HAND).metrics.to_dict("rollout_corr/")

    assert {"rollout_corr/k3", "rollout_corr/ess"} < set(names)


@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf])
@pytest.mark.parametrize("name", ["trainer_logprobs", "rollout_logprobs"])
def test_an_unmasked_token_without_a_finite_logprob_is_named(name, bad):
    batch = {"trainer_logprobs": torch.zeros(2, 3), "rollout_logprobs": torch.zeros(2, 3)}
    batch[name][1, 2] = bad

    with pytest.raises(CorrectionError, match=rf"{name}\[1, 2\] is {bad}, and 1 of 6 unmasked"):
        Correction()(**batch, mask=torch.ones(2, 3))


def test_a_mask_that_weighs_is_refused():
    half = torch.full((1, 2), 0.5)

    with pytest.raises(CorrectionError, match=r"other than 0 and 1.*advantage"):
        Correction()(torch.zeros(1, 2), torch.zeros(1, 2), half)


@pytest.mark.parametrize(
    ("trainer", "rollout", "mask", "remedy"),
    [
        ((3,), (3,), (3,), r"\(3,\), but is \[B, T\].*values\[None\]"),
        ((2, 3), (2, 1), (2, 3), r"rollout_logprobs has shape \(2, 1\)"),
        ((2, 3), (2, 3), (2,), r"the mask \(2,\)"),
        ((2, 3, 1), (2, 3, 1), (2, 3, 1), r"\(2, 3, 1\), but is \[B, T\]"),
    ],
)
def test_shapes_that_differ_are_refused(trainer, rollout, mask, remedy):
    with pytest.raises(CorrectionError, match=remedy):
        Correction()(torch.zeros(trainer), torch.zeros(rollout), torch.ones(mask))


def test_token_ids_are_no_logprobs():
    ids = torch.zeros(1, 2, dtype=torch.int64)

    with pytest.raises(CorrectionError, match="int64, but log-probs are floating"):
        Correction()(ids, ids, torch.ones(1, 2))


@pytest.mark.parametrize(
    ("settings", "remedy"),
    [
        ({"level": "seq"}, "is one of 'token', 'sequence', 'geometric'"),
        ({"cap": 0.0}, "cap=0, but is a number above 0, or None"),
        ({"cap": -1.0}, "cap=-1, but is a number above 0"),
        ({"cap": math.inf}, "cap=inf, but is a number above 0"),
        ({"floor": math.nan}, "floor=nan, but is"),
        ({"floor": 3.0}, "floor=3 is above cap=2"),
        ({"cap": 1e10}, "never be met. Use None"),
        ({"level": None, "normalize": True}, "Give a level"),
        ({"safety_bound": 0.0}, "above 0 and at most 30"),
        ({"safety_bound": 40.0}, "above 0 and at most 30"),
        ({"rejections": (Rejection("ratio", low=1e-12),)}, "low=1e-12.*never be met"),
    ],
)
def test_settings_that_contradict_each_other_are_refused(settings, remedy):
    with pytest.raises(CorrectionError, match=remedy):
        Correction(**settings)


@pytest.mark.parametrize(
    ("settings", "remedy"),
    [
        ({"statistic": "k4", "high": 1.0}, "is one of 'ratio', 'k1', 'k2', 'k3'"),
        (
            {"statistic": "k3", "over": "max", "high": 1.0},
            "is one of 'token', 'any', 'sum', 'mean'",
        ),
        ({"statistic": "ratio"}, "neither low nor high"),
        ({"statistic": "k3", "low": 0.1, "high": 1.0}, "Give high alone"),
        ({"statistic": "ratio", "low": 2.0, "high": 1.0}, "low=2 is above high=1"),
        ({"statistic": "ratio", "high": 0.0}, "high=0, but is a number above 0"),
        ({"statistic": "k1", "high": math.inf}, "high=inf, but is a finite number"),
    ],
)
def test_a_rejection_that_means_nothing_is_refused(settings, remedy):
    with pytest.raises(CorrectionError, match=remedy):
        Rejection(**settings)
