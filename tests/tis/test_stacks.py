"""Each stack's settings give the weights and kept tokens of that stack, written out again here.

The loops below follow what each stack's own loss does with its settings; what differs on purpose
(and is said in the docstrings) has a test of its own.
"""

from __future__ import annotations

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from flashquant.errors import CorrectionError
from flashquant.tis import (
    Correction,
    from_flashrl,
    from_ms_swift,
    from_nemo_rl,
    from_openrlhf,
    from_skyrl,
    from_trl,
    from_verl,
)
from tests.tis.batches import batches, of_ratios, tensors
from tests.tis.derived import deltas, exp, geometric_ratio, k, product_ratio, within

bounded = settings(deadline=None, max_examples=60)


def agrees(correction, batch, weight_of, counts_of=lambda row, token: True):
    """Compare with a weight and a verdict given for each unmasked token of each row."""
    weights, keep_mask, _ = correction(*tensors(batch))
    expected, counts = [], []
    for row in batch:
        counts.append([token[2] and bool(counts_of(row, token)) for token in row])
        expected.append(
            [weight_of(row, token) if c else 0.0 for token, c in zip(row, counts[-1], strict=True)]
        )
    torch.testing.assert_close(
        weights.double(), torch.tensor(expected).double(), rtol=1e-5, atol=1e-8
    )
    assert keep_mask.tolist() == counts


def ratio(token):
    return exp(token[0] - token[1])


# FlashRL


@given(batches(), st.sampled_from([-1.0, 0.0, 2.0, 8.0]))
@bounded
def test_flashrl(batch, cap):
    agrees(
        from_flashrl(tis_imp_ratio_cap=cap),
        batch,
        lambda row, token: min(ratio(token), cap) if cap > 0 else 1.0,
    )


# verl


@given(
    batches(),
    st.sampled_from([None, "token", "sequence"]),
    st.sampled_from([2.0, 3, "5.5", "0.4_2.2"]),
)
@bounded
def test_verls_weights(batch, level, threshold):
    def weight(row, token):
        raw = ratio(token) if level == "token" else product_ratio(row)
        if level is None:
            return 1.0
        if threshold == "0.4_2.2":
            return raw if 0.4 <= raw <= 2.2 else 0.0
        return min(raw, float(threshold))

    agrees(from_verl(rollout_is=level, rollout_is_threshold=threshold), batch, weight)


@given(
    batches(),
    st.sampled_from(["token", "seq_sum", "seq_mean", "seq_max"]),
    st.sampled_from(["k1", "k2", "k3"]),
)
@bounded
def test_verls_rejections(batch, over, which):
    if (over, which) == ("seq_max", "k1"):
        return

    def counts(row, token):
        of = [token[0] - token[1]] if over == "token" else deltas(row)
        values = [k(which, delta) for delta in of]
        if over == "seq_max":
            value = max(values)
        else:
            value = sum(values) / (len(values) if over == "seq_mean" else 1)
        if which == "k1":
            return math.log(0.4) <= value <= math.log(3.3)
        return value <= 0.3

    correction = from_verl(
        rollout_rs=f"{over}_{which}", rollout_rs_threshold="0.4_3.3" if which == "k1" else 0.3
    )
    agrees(correction, batch, lambda row, token: 1.0, counts)


@given(batches(near=True))
@bounded
def test_verl_takes_several_rejections_and_all_must_pass(batch):
    correction = from_verl(
        rollout_is="token",
        rollout_rs="token_k1, seq_mean_k3,token_k1",
        rollout_rs_threshold="0.4_3.3,0.3",
    )

    def counts(row, token):
        k3 = [k("k3", delta) for delta in deltas(row)]
        return 0.4 <= 1 / ratio(token) <= 3.3 and sum(k3) / len(k3) <= 0.3

    agrees(correction, batch, lambda row, token: min(ratio(token), 2.0), counts)


@pytest.mark.parametrize(
    ("option", "kept"),
    # Of each token k2 is 0.24 and k3 is 0.31.
    [
        ("seq_max_k2", True),
        ("seq_mean_k2", True),
        ("seq_sum_k2", False),
        ("token_k2", True),
        ("seq_max_k3", False),
        ("seq_mean_k3", False),
        ("seq_sum_k3", False),
        ("token_k3", False),
    ],
)
def test_verls_options_judge_what_their_names_say(option, kept):
    correction = from_verl(rollout_rs=option, rollout_rs_threshold=0.3)

    assert correction(*of_ratios([2.0, 2.0, None])).keep_mask.any() == kept


def test_verls_bounds_of_k1_are_for_the_inverse_of_the_ratio():
    batch = of_ratios([0.3, 0.6, 1.9, 2.5])

    kept = from_verl(rollout_rs="token_k1", rollout_rs_threshold="0.5_2.5")(*batch).keep_mask

    assert kept.tolist() == [[False, True, True, False]]  # from 1/2.5 to 1/0.5


def test_verls_single_bound_of_k1_is_its_own_inverse():
    shared = from_verl(rollout_rs="seq_sum_k1", rollout_rs_threshold="0.25_4.0")

    assert from_verl(rollout_rs="seq_sum_k1", rollout_rs_threshold=4.0) == shared


def test_one_threshold_of_verl_serves_all_options():
    correction = from_verl(rollout_rs="token_k3,seq_mean_k3", rollout_rs_threshold=0.1)

    assert [rejection.high for rejection in correction.rejections] == [0.1, 0.1]


def test_verl_normalizes_over_what_it_has_zeroed_but_not_over_what_it_rejects():
    batch = of_ratios([1.0, 4.0, 16.0])

    zeroed = from_verl(
        rollout_is="token", rollout_is_threshold="0.5_5", rollout_is_batch_normalize=True
    )(*batch)
    rejected = from_verl(
        rollout_is="token",
        rollout_is_threshold=20,
        rollout_is_batch_normalize=True,
        rollout_rs="token_k2",
        rollout_rs_threshold=1.0,
    )(*batch)

    torch.testing.assert_close(zeroed.weights, torch.tensor([[1.0, 4.0, 0.0]]) / (5 / 3))
    torch.testing.assert_close(rejected.weights, torch.tensor([[1.0, 4.0, 0.0]]) / 7)


def test_verls_bypass_with_ppo_has_rejections_and_no_weights():
    given = {
        "rollout_is": "sequence",
        "rollout_rs": "seq_mean_k3",
        "rollout_rs_threshold": 0.1,
        "bypass_mode": True,
    }

    with_ppo, with_reinforce = from_verl(**given), from_verl(**given, loss_type="reinforce")

    assert with_ppo.level is None
    assert with_reinforce.level == "sequence"
    assert with_ppo.rejections == with_reinforce.rejections


def test_the_defaults_of_verls_yaml_correct_nothing():
    pasted = {
        "rollout_is": None,
        "rollout_is_threshold": 2.0,
        "rollout_rs": None,
        "rollout_rs_threshold": None,
        "bypass_mode": False,
        "loss_type": "ppo_clip",
        "rollout_is_batch_normalize": False,
    }

    assert from_verl(**pasted) == Correction(level=None, cap=None) == from_verl()


# SkyRL


@given(
    batches(),
    st.sampled_from([None, "token", "sequence"]),
    st.sampled_from([None, "product", "geometric"]),
    st.sampled_from([(None, None), (0.2, None), (None, 3.3), (0.2, 20.1)]),
    st.sampled_from([(None, None), (0.4, 2.2)]),
)
@settings(deadline=None, max_examples=150)
def test_skyrl(batch, kind, metric, outlier, token_mask):
    def left(row):
        """After outliers and the token mask."""
        seen = [token[2] for token in row]
        if any(sees and not within(ratio(t), *outlier) for t, sees in zip(row, seen, strict=True)):
            seen = [False] * len(row)
        return [s and within(ratio(t), *token_mask) for t, s in zip(row, seen, strict=True)]

    def weight(row, token):
        seen = left(row)
        stays = any(s and t is token for t, s in zip(row, seen, strict=True))
        if metric == "product":
            stays = stays and 0.5 <= product_ratio(row, seen) <= 2.2
        if metric == "geometric":
            stays = stays and 0.9 <= geometric_ratio(row, seen) <= 1.1
        if kind == "token":
            return min(ratio(token), 2.0) * stays
        return (min(product_ratio(row, seen), 5.0) if kind else 1.0) * stays

    correction = from_skyrl(
        tis_ratio_type=kind,
        sequence_mask_metric=metric,
        product_mask_high=2.2,
        geo_mask_low=0.9,
        geo_mask_high=1.1,
        outlier_token_is_threshold_low=outlier[0],
        outlier_token_is_threshold_high=outlier[1],
        token_mask_is_threshold_low=token_mask[0],
        token_mask_is_threshold_high=token_mask[1],
    )
    agrees(correction, [[tuple(token) for token in row] for row in distinct(batch)], weight)


def distinct(batch):
    """Tokens that are one object each, to be told apart by identity."""
    return [[(float(t), float(r), bool(c)) for t, r, c in row] for row in batch]


def test_skyrls_older_names():
    older = from_skyrl(use_tis=True, tis_imp_ratio_cap=3.0)

    assert older == from_skyrl(tis_ratio_type="token", token_tis_ratio_clip_high=3.0)


def test_skyrls_older_default_would_turn_every_weight_negative():
    with pytest.raises(CorrectionError, match="cap=-1, but is a number above 0"):
        from_skyrl(use_tis=True)


def test_half_a_token_mask_of_skyrl_is_refused():
    with pytest.raises(CorrectionError, match="Give both, or neither"):
        from_skyrl(token_mask_is_threshold_low=0.5)


# TRL


@given(
    batches(),
    st.sampled_from(["token_truncate", "token_mask", "sequence_truncate", "sequence_mask"]),
    st.sampled_from([None, 2.2, 3.0]),
    st.sampled_from([None, 0.0, 0.4]),
)
@settings(deadline=None, max_examples=150)
def test_trl(batch, mode, high, low):
    def weight(row, token):
        value = ratio(token) if mode.startswith("token") else product_ratio(row)
        if mode.endswith("mask"):
            return value if within(value, low, high) else 0.0
        return min(max(value, low or 0.0), high or math.inf)

    correction = from_trl(
        vllm_importance_sampling_mode=mode,
        vllm_importance_sampling_clip_max=high,
        vllm_importance_sampling_clip_min=low,
    )
    agrees(correction, batch, weight)


def test_trl_is_on_by_default_and_masks_sequences():
    batch = of_ratios([2.0, 1.4], [2.0, 1.6])

    weights = from_trl()(*batch).weights

    torch.testing.assert_close(weights, torch.tensor([[2.8, 2.8], [0.0, 0.0]]))


def test_trls_older_name():
    assert from_trl(vllm_importance_sampling_cap=2.0) == from_trl(
        vllm_importance_sampling_clip_max=2.0
    )


# ms-swift


@given(
    batches(),
    st.sampled_from([None, "token_truncate", "token_mask", "sequence_truncate", "sequence_mask"]),
    st.sampled_from([1.2, 2.0]),
)
@bounded
def test_ms_swift(batch, mode, threshold):
    def weight(row, token):
        if mode is None:
            return 1.0
        judged = ratio(token) if mode.startswith("token") else geometric_ratio(row)
        if mode.endswith("truncate"):
            return min(judged, threshold)
        return ratio(token) if judged <= threshold else 0.0

    correction = from_ms_swift(
        rollout_importance_sampling_mode=mode, rollout_importance_sampling_threshold=threshold
    )
    agrees(correction, batch, weight)


# OpenRLHF


@given(
    batches(),
    st.sampled_from([("off", "mask"), ("token", "mask"), ("token", "clip"), ("seq", "mask")]),
    st.sampled_from([(0.5, 5.0), [0.4, 2.2], [2.2], 2.2, [0.0, 2.2]]),
)
@bounded
def test_openrlhf(batch, kind, threshold):
    level, mode = kind
    bounds = [threshold] if isinstance(threshold, float) else list(threshold)
    low, high = bounds if len(bounds) == 2 else (0.0, bounds[0])

    def weight(row, token):
        own = ratio(token)
        if level == "off":
            return 1.0
        if mode == "clip":
            return min(max(own, low), high)
        judged = own if level == "token" else geometric_ratio(row)
        return own if low <= judged <= high else 0.0

    correction = from_openrlhf(
        is_correction_level=level, is_correction_mode=mode, is_correction_threshold=threshold
    )
    agrees(correction, batch, weight)


@pytest.mark.parametrize(
    ("kind", "level", "mode"),
    [("tis", "token", "clip"), ("icepop", "token", "mask"), ("seq-mask-tis", "seq", "mask")],
)
def test_openrlhfs_older_names(kind, level, mode):
    older = from_openrlhf(is_correction_enable=True, is_correction_type=kind)

    assert older == from_openrlhf(is_correction_level=level, is_correction_mode=mode)
    assert from_openrlhf(is_correction_enable=False, is_correction_type=kind) == from_openrlhf()


# NeMo-RL


@given(
    batches(),
    st.sampled_from([None, "tis", "icepop", "seq-mask-tis"]),
    st.booleans(),
    st.sampled_from([0.0, 0.4]),
)
@bounded
def test_nemo_rl(batch, kind, sequence_level, low):
    if kind == "seq-mask-tis" and sequence_level:
        return

    def weight(row, token):
        value = product_ratio(row) if sequence_level else ratio(token)
        if kind == "tis":
            return min(max(value, low), 2.2)
        if kind == "icepop":
            return value if low <= value <= 2.2 else 0.0
        if kind == "seq-mask-tis":
            return value if low <= geometric_ratio(row) <= 2.2 else 0.0
        return value

    correction = from_nemo_rl(
        use_importance_sampling_correction=True,
        truncated_importance_sampling_type=kind,
        truncated_importance_sampling_ratio=2.2 if kind else None,
        truncated_importance_sampling_ratio_min=low if kind else None,
        sequence_level_importance_ratios=sequence_level,
    )
    agrees(correction, batch, weight)


def test_nemo_rl_corrects_nothing_by_default():
    assert from_nemo_rl() == Correction(level=None, cap=None)


def test_an_overflow_is_the_cap_and_not_0():
    trainer, rollout = torch.tensor([[-1.0]]), torch.tensor([[-1000.0]])
    given = {
        "use_importance_sampling_correction": True,
        "truncated_importance_sampling_type": "tis",
        "truncated_importance_sampling_ratio": 2.0,
    }

    assert from_nemo_rl(**given)(trainer, rollout, torch.ones(1, 1)).weights == 2


# What is refused


@pytest.mark.parametrize(
    ("stack", "given", "remedy"),
    [
        (from_verl, {"rollout_is": "geometric"}, "rollout_is='geometric', but is one of"),
        (from_verl, {"rollout_is": "token", "rollout_is_threshold": "2,3"}, "as '0.5_2.0'"),
        (from_verl, {"rollout_is": "token", "rollout_is_threshold": -2.0}, "number above 0"),
        (from_verl, {"rollout_is": "token", "rollout_is_threshold": "5_0.5"}, "low=5 is above"),
        (from_verl, {"rollout_rs": "binary_kl", "rollout_rs_threshold": 1}, "'seq_mean_k3'"),
        (from_verl, {"rollout_rs": "seq_max_k1", "rollout_rs_threshold": 2}, "'seq_max_k2'"),
        (from_verl, {"rollout_rs": "token_k3"}, "Give one threshold"),
        (from_verl, {"rollout_rs": " , ", "rollout_rs_threshold": 1}, "Give one threshold"),
        (from_verl, {"rollout_rs": "token_k3", "rollout_rs_threshold": "1,2"}, "one for each"),
        (from_verl, {"rollout_rs": "token_k3", "rollout_rs_threshold": "1_2"}, "high alone"),
        (from_verl, {"rollout_rs": "token_k1", "rollout_rs_threshold": 0.5}, "is above high"),
        (from_verl, {"loss_type": "gspo"}, "is one of 'ppo_clip', 'reinforce'"),
        (from_skyrl, {"tis_ratio_type": "geometric"}, "is one of 'token', 'sequence'"),
        (from_skyrl, {"sequence_mask_metric": "mean"}, "is one of 'product', 'geometric'"),
        (from_trl, {"vllm_importance_sampling_mode": "mask"}, "is one of 'token_truncate'"),
        (from_ms_swift, {"rollout_importance_sampling_mode": "token"}, "is one of 'token_trunc"),
        (from_openrlhf, {"is_correction_level": "sequence"}, "is one of 'off', 'token', 'seq'"),
        (from_openrlhf, {"is_correction_gating": "tv"}, "is one of 'ratio'"),
        (
            from_openrlhf,
            {"is_correction_level": "seq", "is_correction_mode": "clip"},
            "Choose mode 'mask', or level 'token'",
        ),
        (
            from_openrlhf,
            {"is_correction_level": "token", "is_correction_threshold": [1.0, 2.0, 3.0]},
            "is HIGH, or LOW and HIGH",
        ),
        (from_nemo_rl, {"truncated_importance_sampling_type": "tis"}, "Set it to true"),
        (
            from_nemo_rl,
            {
                "use_importance_sampling_correction": True,
                "truncated_importance_sampling_ratio": 2.0,
            },
            "without a type",
        ),
        (
            from_nemo_rl,
            {
                "use_importance_sampling_correction": True,
                "truncated_importance_sampling_type": "icepop",
                "truncated_importance_sampling_ratio": 5.0,
            },
            "needs truncated_importance_sampling_ratio_min",
        ),
        (
            from_nemo_rl,
            {
                "use_importance_sampling_correction": True,
                "truncated_importance_sampling_type": "tis",
            },
            "needs truncated_importance_sampling_ratio",
        ),
        (
            from_nemo_rl,
            {
                "use_importance_sampling_correction": True,
                "truncated_importance_sampling_type": "seq-mask-tis",
                "truncated_importance_sampling_ratio": 1.002,
                "truncated_importance_sampling_ratio_min": 0.999,
                "sequence_level_importance_ratios": True,
            },
            "Leave one out",
        ),
    ],
)
def test_what_a_stack_would_refuse_or_ignore_is_refused(stack, given, remedy):
    with pytest.raises(CorrectionError, match=remedy):
        stack(**given)


@pytest.mark.parametrize(
    "stack",
    [from_flashrl, from_ms_swift, from_nemo_rl, from_openrlhf, from_skyrl, from_trl, from_verl],
)
def test_a_setting_that_no_stack_has_is_refused(stack):
    with pytest.raises(TypeError, match="rollout_iz"):
        stack(rollout_iz="token")
