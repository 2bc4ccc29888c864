"""Log-probs over the tokens that were kept: against plain Python, and against vLLM's own cut."""

from __future__ import annotations

import math
from types import SimpleNamespace

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from flashquant.errors import CorrectionError
from flashquant.tis import Truncation, masked_logprobs, sampling

bounded = settings(deadline=None, max_examples=60)


def by_hand(logits: list[float], token: int, kept: list[int], temperature: float) -> float:
    return math.log(
        math.exp(logits[token] / temperature)
        / math.fsum(math.exp(logits[i] / temperature) for i in kept)
    )


def survivors(
    logits: list[float], temperature: float, top_k: int | None, top_p: float, min_p: float
) -> list[int]:
    """By their definitions, one after the other; ties stay together."""
    scaled = [value / temperature for value in logits]
    best = max(scaled)
    left = [i for i, x in enumerate(scaled) if math.exp(x - best) >= min_p]
    ranked = sorted((scaled[i] for i in left), reverse=True)
    if top_k is not None and 0 < top_k < len(ranked):
        left = [i for i in left if scaled[i] >= ranked[top_k - 1]]
    total = math.fsum(math.exp(scaled[i] - best) for i in left)
    held, last = 0.0, best
    for x in sorted((scaled[i] for i in left), reverse=True):
        if held >= top_p:
            break
        held, last = held + math.exp(x - best) / total, x
    return [i for i in left if scaled[i] >= last]


@st.composite
def problems(draw):
    """Logits on a grid of eighths, tokens, a list of survivors for each place, a mask."""
    rows, columns, size = draw(st.integers(1, 3)), draw(st.integers(1, 4)), draw(st.integers(2, 9))
    grid = st.integers(-80, 80)
    logits = [[[draw(grid) / 8 for _ in range(size)] for _ in range(columns)] for _ in range(rows)]
    kept = [
        [sorted(draw(st.sets(st.integers(0, size - 1), min_size=1))) for _ in range(columns)]
        for _ in range(rows)
    ]
    tokens = [[draw(st.sampled_from(place)) for place in row] for row in kept]
    mask = [[draw(st.booleans()) for _ in range(columns)] for _ in range(rows)]
    return logits, tokens, kept, mask


def only_unmasked(kept: list[list[list[int]]], mask: list[list[bool]]) -> list[list[list[int]]]:
    return [
        [place for place, counts in zip(row, row_mask, strict=True) if counts]
        for row, row_mask in zip(kept, mask, strict=True)
    ]


@given(problem=problems(), temperature=st.sampled_from([0.5, 1.0, 1.5]))
@bounded
def test_value_and_gradient_are_those_of_the_definition(problem, temperature):
    logits, tokens, kept, mask = problem
    given_logits = torch.tensor(logits, requires_grad=True)

    values = masked_logprobs(
        given_logits,
        torch.tensor(tokens),
        only_unmasked(kept, mask),
        temperature=temperature,
        mask=torch.tensor(mask),
    )
    slopes = torch.arange(1.0, values.numel() + 1).view_as(values)
    (values * slopes).sum().backward()

    for b, row in enumerate(logits):
        for t, place in enumerate(row):
            expected, gradient = 0.0, [0.0] * len(place)
            if mask[b][t]:
                expected = by_hand(place, tokens[b][t], kept[b][t], temperature)
                for i in range(len(place)):
                    share = by_hand(place, i, kept[b][t], temperature) if i in kept[b][t] else None
                    down = 0.0 if share is None else math.exp(share)
                    up = float(i == tokens[b][t])
                    gradient[i] = slopes[b, t].item() * (up - down) / temperature
            assert values[b, t].item() == pytest.approx(expected, abs=1e-5)
            assert given_logits.grad[b, t].tolist() == pytest.approx(gradient, abs=1e-4)


@given(
    problem=problems(),
    temperature=st.sampled_from([0.5, 1.0, 1.5]),
    top_k=st.sampled_from([None, -1, 0, 1, 3]),
    top_p=st.sampled_from([0.05, 0.37, 0.93, 1.0]),
    min_p=st.sampled_from([0.0, 0.013, 0.41, 1.0]),
)
@bounded
def test_a_truncation_keeps_what_its_definitions_keep(problem, temperature, top_k, top_p, min_p):
    logits, tokens, _, mask = problem

    values = masked_logprobs(
        torch.tensor(logits),
        torch.tensor(tokens),
        Truncation(top_k=top_k, top_p=top_p, min_p=min_p),
        temperature=temperature,
        mask=torch.tensor(mask),
    )

    for b, row in enumerate(logits):
        for t, place in enumerate(row):
            if mask[b][t]:
                kept = survivors(place, temperature, top_k, top_p, min_p)
                kept = sorted({*kept, tokens[b][t]})
                expected = by_hand(place, tokens[b][t], kept, temperature)
                assert values[b, t].item() == pytest.approx(expected, abs=1e-4)


@pytest.mark.parametrize("top_k", [None, 1, 20, 500])
@pytest.mark.parametrize("top_p", [0.3, 0.9, 1.0])
def test_a_truncation_keeps_what_vllms_sampler_keeps(top_k, top_p):
    """On the same logits: the approximation is in the logits, not in the cut."""
    vllm = pytest.importorskip("vllm.v1.sample.ops.topk_topp_sampler")
    scaled = torch.randn(40, 3000, generator=torch.Generator().manual_seed(0)) * 3
    k = None if top_k is None else torch.full((40,), top_k)
    p = None if top_p == 1 else torch.full((40,), top_p)

    floor = Truncation(top_k=top_k, top_p=top_p).floor(scaled)

    theirs = vllm.apply_top_k_top_p(scaled.clone(), k, p)
    assert torch.equal(scaled >= floor, theirs > -math.inf)


def test_min_p_is_cut_before_top_k_and_top_p():
    """Of 0.5, 0.3, 0.2: without the last, the first holds 0.625 of what is left."""
    logits = torch.tensor([[[0.5, 0.3, 0.2]]]).log()

    def kept(**cut: float) -> Tensor:
        return (logits[0] >= Truncation(**cut).floor(logits[0])).squeeze(0)

    assert kept(top_p=0.6).tolist() == [True, True, False]
    assert kept(top_p=0.6, min_p=0.5).tolist() == [True, False, False]


def test_the_most_likely_token_stays_under_any_cut():
    """1 less such a top_p is 1 in float32, which all of them together do not exceed."""
    logits = torch.tensor([[1.0, 3.0, 2.0]])

    assert Truncation(top_p=1e-9).floor(logits).item() == 3
    assert Truncation(top_k=1, min_p=1.0, top_p=1e-9).floor(logits).item() == 3


class Largest(TorchDispatchMode):
    """Elements of the largest tensors that operations made, by dtype."""

    def __init__(self) -> None:
        super().__init__()
        self.elements: dict[torch.dtype, int] = {}

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        made = func(*args, **(kwargs or {}))
        if not func.is_view:
            for tensor in made if isinstance(made, tuple) else (made,):
                if isinstance(tensor, Tensor):
                    before = self.elements.get(tensor.dtype, 0)
                    self.elements[tensor.dtype] = max(before, tensor.numel())
        return made


@pytest.mark.parametrize("listed", [True, False])
def test_nothing_of_the_logits_size_is_made_but_their_gradient(monkeypatch, listed):
    """`python -m benchmarks.sampling_mask --memory` measures it."""
    monkeypatch.setattr(sampling, "_CHUNK", 4000)
    logits = torch.randn(2, 64, 1000).bfloat16().requires_grad_()
    tokens = torch.randint(1000, (2, 64))
    kept = tokens.unsqueeze(-1).tolist() if listed else Truncation(top_k=50, top_p=0.9)

    with Largest() as largest:
        masked_logprobs(logits, tokens, kept).sum().backward()

    assert largest.elements.pop(torch.bfloat16) == logits.numel()
    assert max(largest.elements.values()) <= 4000


@pytest.mark.parametrize("length", [3, 8192])
def test_without_a_cut_it_is_the_log_softmax(length):
    logits, tokens = torch.randn(2, length, 50), torch.randint(50, (2, length))

    values = masked_logprobs(logits, tokens, Truncation())

    expected = logits.log_softmax(-1).gather(-1, tokens.unsqueeze(-1)).squeeze(-1)
    torch.testing.assert_close(values, expected)


def test_what_vllm_returns_is_taken_as_it_is():
    logits, tokens = torch.zeros(2, 2, 5), torch.tensor([[1, 2], [3, 0]])
    outputs = [SimpleNamespace(token_ids=[[1, 4], [0, 1, 2, 3]]), SimpleNamespace(token_ids=[[3]])]

    values = masked_logprobs(logits, tokens, outputs, mask=torch.tensor([[1, 1], [1, 0]]))

    torch.testing.assert_close(values, torch.tensor([[0.5, 0.25], [1.0, 1.0]]).log())


@pytest.mark.parametrize("rubbish", [math.nan, math.inf, -math.inf])
def test_what_stands_on_masked_tokens_reaches_neither_value_nor_gradient(rubbish):
    logits, mask = torch.randn(2, 4, 6), torch.tensor([[1, 0, 1, 0], [0, 0, 1, 1]]).bool()
    logits[~mask] = rubbish
    tokens = torch.where(mask, 2, -100)
    logits.requires_grad_()

    values = masked_logprobs(logits, tokens, Truncation(top_k=3, top_p=0.9), mask=mask)
    values.sum().backward()

    assert values.isfinite().all()
    assert (values[~mask] == 0).all()
    assert logits.grad.isfinite().all()
    assert (logits.grad[~mask] == 0).all()


def test_positions_taken_a_few_at_a_time_are_those_taken_at_once(monkeypatch):
    logits, tokens = torch.randn(3, 11, 7), torch.randint(7, (3, 11))
    mask = torch.rand(3, 11) > 0.3
    kept = [
        [[*range(int(t) + 1)] for t in row[keep]] for row, keep in zip(tokens, mask, strict=True)
    ]

    def both(cut):
        leaf = logits.clone().requires_grad_()
        values = masked_logprobs(leaf, tokens, cut, mask=mask)
        values.square().sum().backward()
        return values, leaf.grad

    for cut in (kept, Truncation(top_k=4, top_p=0.8)):
        whole = both(cut)
        with monkeypatch.context() as patched:
            patched.setattr(sampling, "_CHUNK", 14)
            pieces = both(cut)
        assert torch.equal(whole[0], pieces[0])
        assert torch.equal(whole[1], pieces[1])


def test_a_bf16_policy_has_float32_values_and_a_bf16_gradient():
    logits = torch.randn(1, 3, 8, dtype=torch.bfloat16, requires_grad=True)

    values = masked_logprobs(logits, torch.zeros(1, 3, dtype=torch.long), Truncation(top_p=0.9))
    values.sum().backward()

    assert values.dtype == torch.float32
    assert logits.grad.dtype == torch.bfloat16


def test_logits_of_a_padded_vocabulary_take_no_part():
    logits = torch.tensor([[[1.0, 2.0, -math.inf]]], requires_grad=True)

    values = masked_logprobs(logits, torch.tensor([[0]]), Truncation())
    values.sum().backward()

    torch.testing.assert_close(values, torch.tensor([[-math.log(1 + math.e)]]))
    assert logits.grad[0, 0, 2] == 0


def test_nothing_sampled_is_no_error():
    logits = torch.randn(2, 3, 4, requires_grad=True)

    values = masked_logprobs(
        logits, torch.full((2, 3), -1), [[], []], mask=torch.zeros(2, 3, dtype=torch.bool)
    )
    values.sum().backward()

    assert torch.equal(values, torch.zeros(2, 3))
    assert torch.equal(logits.grad, torch.zeros(2, 3, 4))


@pytest.mark.parametrize(
    ("wrong", "remedy"),
    [
        ({"logits": torch.zeros(2, 4)}, r"are floating point and \[B, T, V\]"),
        ({"logits": torch.zeros(1, 2, 4, dtype=torch.long)}, "floating point"),
        ({"tokens": torch.zeros(1, 3, dtype=torch.long)}, r"logits\[:, :-1\] predict"),
        ({"tokens": torch.tensor([[1, 9]])}, r"tokens\[0, 1\] is 9.*vocabulary has 4"),
        ({"kept": [[[1]]]}, r"\[1\] lists.*\[2\] sampled"),
        ({"kept": [[[1], [2]], [[1]]]}, "one list for each unmasked token"),
        ({"kept": [[[1], [3]]]}, r"token 2 was sampled at \[0, 1\].*without it"),
        ({"kept": [[[1], [2, 4]]]}, "vocabulary of 4"),
        ({"temperature": 0.0}, "greedy"),
        ({"mask": torch.ones(1, 3)}, "mask has shape"),
    ],
)
def test_what_cannot_be_meant_is_refused(wrong, remedy):
    usual = {
        "logits": torch.zeros(1, 2, 4),
        "tokens": torch.tensor([[1, 2]]),
        "kept": [[[1], [2]]],
        "temperature": 1.0,
        "mask": None,
    }

    with pytest.raises(CorrectionError, match=remedy):
        masked_logprobs(**usual | wrong)


@pytest.mark.parametrize(
    "cut", [{"top_k": -2}, {"top_p": 0.0}, {"top_p": 1.1}, {"min_p": -0.1}, {"min_p": 1.5}]
)
def test_a_cut_that_vllm_would_refuse_is_refused(cut):
    with pytest.raises(CorrectionError, match=next(iter(cut))):
        Truncation(**cut)
