"""DPPO, TRM, decoupled PPO and VCPO, each from its paper's formula in plain Python."""

from __future__ import annotations

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from flashquant.errors import CorrectionError
from flashquant.tis import (
    DPPO,
    Correction,
    effective_sample_size,
    from_areal,
    from_verl,
    loss,
    step_scale,
    trm,
)
from tests.tis.batches import batches, of_ratios, tensors

bounded = settings(deadline=None, max_examples=60)
logprob = st.integers(-64, 0).map(lambda x: x / 8)
NONE = Correction(level=None)


def divergence(kind: str, pi: float, mu: float) -> float:
    if kind == "binary_tv":
        return abs(pi - mu)
    others_pi, others_mu = max(1 - pi, 1e-7), max(1 - mu, 1e-7)
    return mu * math.log(mu / pi) + others_mu * math.log(others_mu / others_pi)


def of_dppo(pi: float, mu: float, advantage: float, region: DPPO) -> tuple[float, float]:
    """Loss of one token, and its derivative by log pi."""
    ratio = pi / mu
    d = divergence(region.dppo_type, pi, mu)
    if advantage > 0 and ratio > 1 and d > region.delta_high:
        return 0.0, 0.0
    if advantage < 0 and ratio < 1 and d > region.delta_low:
        return 0.0, 0.0
    value = -min(ratio, region.ratio_cap or math.inf) * advantage
    return value, value  # d r / d log pi is r


@pytest.mark.parametrize("kind", ["binary_tv", "binary_kl"])
@given(
    pairs=st.lists(
        st.tuples(logprob, logprob, st.integers(-8, 8), st.booleans()), min_size=1, max_size=8
    ),
    low=st.sampled_from([0.0, 0.053, 0.217]),
    high=st.sampled_from([0.0, 0.053, 0.217]),
    cap=st.sampled_from([None, 1.0, 20.0]),
)
@bounded
def test_dppo_is_its_formula_in_value_and_gradient(pairs, low, high, cap, kind):
    region = DPPO(kind, low, high, cap)
    pi, mu, advantages = (torch.tensor([column]) for column in [*zip(*pairs, strict=True)][:3])
    mask = torch.tensor([[pair[3] for pair in pairs]])
    pi.requires_grad_()

    value, metrics = loss(
        pi,
        old_logprobs=None,
        rollout_logprobs=mu,
        advantages=advantages.float(),
        mask=mask,
        correction=NONE,
        dppo=region,
    )
    value.backward()

    found = [
        of_dppo(math.exp(p), math.exp(m), a, region) if counts else (0.0, 0.0)
        for p, m, a, counts in pairs
    ]
    count = max(sum(pair[3] for pair in pairs), 1)
    assert value.item() == pytest.approx(sum(f[0] for f in found) / count, rel=1e-4, abs=1e-5)
    assert pi.grad[0].tolist() == pytest.approx([f[1] / count for f in found], rel=1e-4, abs=1e-5)
    held = sum(
        counts and a != 0 and f == (0.0, 0.0)
        for f, (_, _, a, counts) in zip(found, pairs, strict=True)
    )
    assert metrics.clip_fraction.item() == pytest.approx(held / count)


def test_dppo_leaves_a_rare_token_that_ppo_would_clip():
    mu, pi = torch.tensor([[math.log(1e-4)]]), torch.tensor([[math.log(1e-2)]])
    given = {
        "old_logprobs": None,
        "rollout_logprobs": mu,
        "advantages": torch.ones(1),
        "mask": torch.ones(1, 1),
        "correction": NONE,
    }

    clipped, _ = loss(pi, **given)
    trusted, _ = loss(pi, **given, dppo=DPPO())
    capped, _ = loss(pi, **given, dppo=DPPO(ratio_cap=20.0))

    assert clipped.item() == pytest.approx(-1.28)
    assert trusted.item() == pytest.approx(-100.0, rel=1e-4)
    assert capped.item() == -20


def test_dppo_around_a_recomputed_policy_is_weighted():
    """verl's, with its `rollout_is_weights`."""
    old, rollout = torch.tensor([[math.log(0.5)]]), torch.tensor([[math.log(0.4)]])

    value, _ = loss(
        old + 0.1,
        old_logprobs=old,
        rollout_logprobs=rollout,
        advantages=torch.ones(1),
        mask=torch.ones(1, 1),
        correction=Correction(),
        dppo=DPPO(),
    )

    assert value.item() == pytest.approx(-1.25 * math.exp(0.1), rel=1e-5)


@pytest.mark.parametrize("kind", ["binary_tv", "binary_kl"])
@pytest.mark.parametrize("rubbish", [math.nan, math.inf, -math.inf])
def test_dppo_is_blind_to_masked_tokens_and_finite_at_certainty(kind, rubbish):
    pi = torch.tensor([[0.0, -40.0, 0.0, rubbish]], requires_grad=True)
    mu = torch.tensor([[0.0, 0.0, -40.0, rubbish]])

    value, _ = loss(
        pi,
        old_logprobs=None,
        rollout_logprobs=mu,
        advantages=torch.tensor([[-1.0, -1.0, 1.0, rubbish]]),
        mask=torch.tensor([[1, 1, 1, 0]]),
        correction=NONE,
        dppo=DPPO(kind, 0.1, 0.1),
    )
    value.backward()

    assert value.isfinite()
    assert pi.grad.isfinite().all()
    assert pi.grad[0, 3] == 0


@given(batch=batches(near=True), edge=st.sampled_from([0.3, 1.06]), mean=st.sampled_from([0.07, 2]))
@bounded
def test_trm_masks_a_sequence_by_its_worst_token_and_by_its_mean(batch, edge, mean):
    _, keep_mask, metrics = trm(max_log_ratio=edge, mean_kl=mean)(*tensors(batch))

    for row, kept in zip(batch, keep_mask.tolist(), strict=True):
        logs = [trainer - rollout for trainer, rollout, counts in row if counts]
        stays = all(abs(log) <= edge for log in logs) and math.fsum(
            math.exp(log) - 1 - log for log in logs
        ) <= mean * len(logs)
        assert kept == [counts and stays for *_, counts in row]
    assert 0 <= metrics.rejected_fraction <= 1


def test_trm_is_verls():
    edge, mean = 0.5, 0.02
    verls = from_verl(
        rollout_rs="seq_max_k2,seq_mean_k3", rollout_rs_threshold=f"{edge**2 / 2},{mean}"
    )

    assert trm(max_log_ratio=edge, mean_kl=mean).rejections == verls.rejections


def test_when_trm_masks_every_sequence_the_loss_is_0_and_says_so():
    far, rollout, mask = of_ratios([9.0, 1.0], [1.0, 0.1])
    logprobs = far.clone().requires_grad_()

    value, metrics = loss(
        logprobs,
        old_logprobs=None,
        rollout_logprobs=rollout,
        advantages=torch.ones(2),
        mask=mask,
        correction=trm(max_log_ratio=0.5),
        dppo=DPPO(),
    )
    value.backward()

    assert value == 0
    assert torch.equal(logprobs.grad, torch.zeros(2, 2))
    assert metrics.correction.rejected_fraction == 1
    assert all(metric.isfinite() for metric in metrics.to_dict().values())


@given(
    tokens=st.lists(
        st.tuples(*[st.integers(-20, 0).map(lambda x: x / 8)] * 3, st.integers(-4, 4)),
        min_size=1,
        max_size=6,
    )
)
@bounded
def test_decoupled_ppo_is_its_formula(tokens):
    """2110.00641: pi_prox / pi_behav * min(r A, clip(r) A), with r = pi / pi_prox."""
    pi, proximal, behaviour, advantages = (
        torch.tensor([column]) for column in zip(*tokens, strict=True)
    )

    value, _ = loss(
        pi,
        old_logprobs=proximal,
        rollout_logprobs=behaviour,
        advantages=advantages.float(),
        mask=torch.ones_like(pi),
        correction=Correction(cap=None),
        clip_high=0.2,
    )

    expected = []
    for p, prox, behav, a in tokens:
        ratio = math.exp(p - prox)
        expected.append(-math.exp(prox - behav) * min(ratio * a, max(0.8, min(1.2, ratio)) * a))
    assert value.item() == pytest.approx(sum(expected) / len(expected), rel=1e-4, abs=1e-5)


def weights(correction: Correction, *ratios: list[float]) -> tuple[list, list]:
    found, kept, _ = correction(*of_ratios(*ratios))
    return found.tolist(), kept.tolist()


def near(*values: float) -> list:
    return [pytest.approx(list(values), rel=1e-4)]


def test_areals_settings():
    assert weights(from_areal(upper=5.0), [4.0, 6.0]) == (near(4, 0), [[True, False]])
    assert weights(from_areal(action="clamp", upper=5.0, lower=0.5), [0.1, 6.0])[0] == near(0.5, 5)
    assert weights(from_areal(level="sequence", upper=2.5), [1.0, 4.0])[0] == near(2, 2)
    assert weights(from_areal(level="sequence", upper=1.5), [1.0, 4.0])[1] == [[False, False]]
    pasted = {"level": "token", "action": "clamp", "metric": "ratio", "upper": 2.0, "lower": 0.0}
    assert from_areal(**pasted) == Correction(cap=2.0)  # as in examples/areal.yaml
    k1 = from_areal(metric="kl_k1", upper=math.log(3), lower=-math.log(2))
    assert weights(k1, [2.9, 3.1, 0.6, 0.4])[1] == [[True, False, True, False]]
    k3 = from_areal(metric="kl_k3", upper=0.4)
    assert weights(k3, [2.0, 3.0])[1] == [[True, False]]


@pytest.mark.parametrize(
    "settings_of",
    [
        {"level": "row"},
        {"action": "drop"},
        {"metric": "kl_k4"},
        {"action": "clamp", "metric": "kl_k2"},
        {"level": "sequence", "metric": "kl_k2"},
        {"level": "sequence", "agg": "max"},
    ],
    ids=str,
)
def test_what_areal_does_not_have_or_nobody_knows_is_refused(settings_of):
    with pytest.raises(CorrectionError):
        from_areal(**settings_of)


@given(batch=batches())
@bounded
def test_the_effective_sample_size_is_its_formula_however_far_apart(batch):
    """Beyond what exp holds: over the largest weight, as in the definition's own scale."""
    found = effective_sample_size(*tensors(batch))

    logs = [
        math.fsum(t - r for t, r, counts in row if counts)
        for row in batch
        if any(counts for *_, counts in row)
    ]
    top = max(logs, default=0.0)
    ws = [math.exp(log - top) for log in logs]
    expected = sum(ws) ** 2 / (len(ws) * sum(w * w for w in ws)) if ws else 0.0
    assert found.item() == pytest.approx(expected, rel=1e-5)


def test_one_sequence_that_outweighs_all_others_is_one_of_them():
    trainer = torch.zeros(4, 8192)
    rollout = torch.zeros(4, 8192)
    rollout[0] = -0.1  # 819 nats in all: no float holds the ratio

    ess = effective_sample_size(trainer, rollout, torch.ones(4, 8192))

    assert ess == 0.25
    assert step_scale(ess) == 0.5


@pytest.mark.parametrize(
    ("ess", "options", "scale"),
    [
        (3 / 7, {}, math.sqrt(3 / 7)),
        (0.2, {"base_ess_ratio": 0.8}, 0.5),
        (0.2, {"base_ess_ratio": 0.8, "scaling_rule": "linear"}, 0.25),
        (torch.tensor(0.0), {}, 0.0),
    ],
)
def test_a_step_is_as_long_as_the_root_of_what_is_there(ess, options, scale):
    assert step_scale(ess, **options) == pytest.approx(scale)


def of_weights(*logs: float) -> Tensor:
    return torch.tensor([[log] for log in logs])


def test_the_ess_of_known_weights():
    """1, 1, 1 and 9: 12 squared over 84 of four."""
    ess = effective_sample_size(
        of_weights(0.0, 0.0, 0.0, math.log(9)), of_weights(0.0, 0.0, 0.0, 0.0), torch.ones(4, 1)
    )

    assert ess.item() == pytest.approx(3 / 7)


@pytest.mark.parametrize(
    "made",
    [
        lambda: DPPO("topk_tv"),
        lambda: DPPO(delta_low=-0.1),
        lambda: DPPO(delta_high=math.inf),
        lambda: DPPO(ratio_cap=0.5),
        lambda: trm(),
        lambda: trm(max_log_ratio=0.0),
        lambda: trm(mean_kl=-1.0),
        lambda: step_scale(0.5, base_ess_ratio=0.0),
        lambda: step_scale(0.5, scaling_rule="cube"),
    ],
)
def test_settings_that_mean_nothing_are_refused(made):
    with pytest.raises(CorrectionError):
        made()
