"""A parameter with two names: in any order, over any calls, equal is taken and other refused."""

from __future__ import annotations

import itertools
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from types import MappingProxyType

import pytest
import torch
from torch import Tensor

from flashquant.errors import IncompleteUpdate, MisfitTensor
from flashquant.update import Session
from tests.support.fake_engine import FakeEngine, FakeLayer, serving

EMBEDDINGS, HEAD = "embed.weight", "lm_head.weight"
TIED = MappingProxyType({HEAD: EMBEDDINGS})


class TiedLayer(FakeLayer):
    def held(self, target: str) -> Tensor:
        stage = self._stages[target]
        return stage.memory(self.device) if stage.started else self.live[target]


class TiedEngine(FakeEngine):
    """One more layer, whose only parameter has two names.

    `drops` as loaders of vLLM did until 0.30: they leave the second name out, without a word.
    Later ones refuse it where it comes without the first.
    """

    tied = TIED

    def __init__(self, *, drops: bool = False) -> None:
        super().__init__()
        self.embed = TiedLayer("embed", {EMBEDDINGS: torch.zeros(5, 3, dtype=torch.bfloat16)})
        self.layers = (*self.layers, self.embed)
        self.live = self.live | self.embed.live
        self.targets = {name: param.to("meta") for name, param in self.live.items()}
        self.stored, self._under, self._drops = self.targets, self.live, drops

    def load(self, weights) -> None:
        offered = list(weights)
        for name, loaded in offered:
            if name == HEAD and HEAD in self._under and not self._drops:
                self._under[HEAD].copy_(loaded)
            elif name == HEAD and EMBEDDINGS not in dict(offered) and not self._drops:
                raise ValueError("'lm_head.weight' was skipped because it is tied")
            elif name == EMBEDDINGS:
                self._under[EMBEDDINGS].copy_(loaded)
            else:
                super().load([(name, loaded)])

    @contextmanager
    def apart(self) -> Iterator[Mapping[str, Tensor]]:
        kept = self._under
        alone = torch.empty_like(self.targets[EMBEDDINGS])
        self._under = {**self.targets} if self._drops else {**self.targets, HEAD: alone}
        try:
            yield self._under
        finally:
            self._under = kept


def policy(seed: int) -> dict[str, Tensor]:
    dice = torch.Generator().manual_seed(seed)
    shapes = {EMBEDDINGS: (5, 3), "q.weight": (4, 4), "k.weight": (2, 4), "norm.weight": (4,)}
    made = {n: torch.randn(shape, generator=dice).bfloat16() for n, shape in shapes.items()}
    return {**made, HEAD: made[EMBEDDINGS]}


def headless(weights: Mapping[str, Tensor]) -> dict[str, Tensor]:
    return {name: tensor for name, tensor in weights.items() if name != HEAD}


A, B = policy(1), policy(2)
ORDERS = {"head last": dict, "head first": lambda w: {HEAD: w[HEAD], **w}, "no head": headless}


@pytest.fixture(params=[False, True], ids=["refuses", "drops"])
def engine(request: pytest.FixtureRequest) -> TiedEngine:
    return TiedEngine(drops=request.param)


@pytest.fixture
def session(engine: TiedEngine) -> Session:
    return serving(engine, headless(A))


def one_by_one(session: Session, weights: Mapping[str, Tensor]) -> None:
    for pair in weights.items():
        session.push([pair])
    session.check_nothing_waits()


def at_once(session: Session, weights: Mapping[str, Tensor]) -> None:
    session.push(list(weights.items()))
    session.check_nothing_waits()


def in_a_bracket(session: Session, weights: Mapping[str, Tensor]) -> None:
    session.reload(weights)


DOORS = (one_by_one, at_once, in_a_bracket)


def serves(engine: TiedEngine, weights: Mapping[str, Tensor]) -> bool:
    new = TiedEngine()
    serving(new, headless(weights))
    return all(torch.equal(engine.live[name], new.live[name]) for name in new.live)


HABITS = [pair for pair in itertools.product(ORDERS, repeat=2) if pair != ("no head", "head first")]


@pytest.mark.parametrize("doors", [*itertools.product(DOORS, repeat=2)])
@pytest.mark.parametrize("orders", HABITS)
def test_equal_values_are_taken_whatever_the_habit(engine, session, orders, doors):
    """Of one trainer, then of another one."""
    for order, push in zip(orders, doors, strict=True):
        for weights in (B, A, B):
            push(session, ORDERS[order](weights))
            assert serves(engine, weights)
    assert session.status().pending == {}


def test_a_head_that_was_never_sent_and_now_comes_first_is_refused_once(engine, session):
    """It may be that of the embeddings that came before, and then it is another one."""
    one_by_one(session, headless(B))
    with pytest.raises(MisfitTensor, match="different values"):
        one_by_one(session, ORDERS["head first"](A))

    one_by_one(session, ORDERS["head first"](A))

    assert serves(engine, A)


@pytest.mark.parametrize("push", DOORS)
@pytest.mark.parametrize("order", list(ORDERS.values())[:2])
def test_other_values_are_refused_and_the_next_policy_goes_through(engine, session, order, push):
    for _ in range(2):
        with pytest.raises(MisfitTensor, match=r"different values.*tie_word_embeddings=false"):
            push(session, order({**B, HEAD: A[HEAD]}))
        if push is not one_by_one:
            assert serves(engine, A)

    push(session, order(B))
    assert serves(engine, B)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
def test_another_precision_is_compared_as_it_is_stored(engine, session, dtype):
    for order in ORDERS.values():
        one_by_one(session, order({name: tensor.to(dtype) for name, tensor in B.items()}))
        assert serves(engine, B)


def test_a_second_name_alone_is_no_update(engine, session):
    with pytest.raises(IncompleteUpdate, match=r"lm_head\.weight arrived, but embed\.weight"):
        session.reload({HEAD: B[HEAD]}, strict=False)
    session.push([(HEAD, B[HEAD])])
    assert session.status().pending == {"embed": (HEAD, EMBEDDINGS)}
    with pytest.raises(IncompleteUpdate, match=r"lm_head\.weight arrived, but embed\.weight"):
        session.check_nothing_waits()

    session.push([(HEAD, A[HEAD])])  # what is live: nothing is missing
    session.check_nothing_waits()
    assert session.status().pending == {}


def test_a_push_that_fails_has_not_brought_a_second_name(session):
    bad = [(HEAD, B[HEAD]), ("norm.weight", B["norm.weight"] * torch.nan)]
    with pytest.raises(MisfitTensor, match="NaN"):
        session.push(bad)

    session.push([(EMBEDDINGS, A[EMBEDDINGS])])


def test_a_trainer_that_died_after_the_second_name_costs_the_next_one_an_error_at_most(
    engine, session
):
    """Another one, that sends it in another order: refused once, never mixed."""
    session.push([(HEAD, B[HEAD])])
    weights = policy(3)

    with pytest.raises(MisfitTensor, match="different values"):
        session.push([(EMBEDDINGS, weights[EMBEDDINGS])])
    one_by_one(session, weights)

    assert serves(engine, weights)


def test_a_checkpoint_that_held_both_does_not_ask_for_both():
    """And the plan has forgotten where the second one went before they became one."""
    engine = TiedEngine(drops=True)
    session = serving(engine, A)

    session.reload(headless(B), strict=True)

    assert serves(engine, B)
