"""What a sleep at level 2 would lose, and no push brings back."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import nn

from flashquant.patches.channels import CACHE_AWAY
from flashquant.patches.seams import sleep


class Attention(nn.Module):
    """As vLLM makes it of a W8A8 checkpoint up to 0.27: its scales are parameters."""

    def __init__(self) -> None:
        super().__init__()
        for name, value in (("_k_scale", 0.25), ("_v_scale", 0.5), ("_q_scale", 2.0)):
            setattr(self, name, nn.Parameter(torch.tensor([value]), requires_grad=False))
        self.weight = nn.Parameter(torch.ones(2, 2))
        self.q_range = torch.tensor(200.0)  # on the device, and no buffer


def worker_of(model: nn.Module) -> Any:
    return SimpleNamespace(get_model=lambda: model, get_draft_model=lambda: None)


def lose(model: Any) -> None:
    for parameter in model.parameters():
        parameter.data.fill_(torch.nan)
    model.q_range.fill_(torch.nan)


def scales(model: Any) -> list[float]:
    """And what else no push brings."""
    names = ("_k_scale", "_v_scale", "_q_scale", "q_range")
    return [getattr(model, name).item() for name in names]


def sleeps(worker: Any) -> None:
    sleep._sleep(lambda worker, level: lose(worker.get_model()), worker, 2)


def is_discarded(worker: Any) -> None:
    sleep._discard(lambda worker, tags: lose(worker.get_model()), worker, ("weights",))


@pytest.mark.parametrize("away", [sleeps, is_discarded])
@pytest.mark.parametrize("times", [1, 2])
def test_what_no_push_brings_comes_back_with_the_memory_it_had(away: Any, times: int):
    """Also where an engine is put to sleep that sleeps already."""
    model = Attention()
    worker = worker_of(model)
    before, homes = scales(model), [p.data_ptr() for p in model.parameters()]

    for _ in range(times):
        away(worker)
    sleep._wake_up(lambda worker, tags: None, worker, ["weights"])

    assert scales(model) == before
    assert [p.data_ptr() for p in model.parameters()] == homes


def test_nothing_is_read_of_an_engine_that_sleeps_already(monkeypatch: pytest.MonkeyPatch):
    """At level 1 its memory is away, and only vLLM's allocator has what was in it."""
    serving = SimpleNamespace(asleep=True)
    session = SimpleNamespace(
        transactions=SimpleNamespace(serving=serving), sleep=lambda *, keeps_weights: None
    )
    monkeypatch.setattr(sleep, "find_session", lambda model: session)
    monkeypatch.setattr(sleep, "leaves", lambda module: pytest.fail("it was read"))

    is_discarded(worker_of(Attention()))


def test_weights_are_left_to_the_next_push():
    model = Attention()
    worker = worker_of(model)

    sleep._sleep(lambda worker, level: lose(model), worker, 2)
    sleep._wake_up(lambda worker, tags: None, worker)

    assert model.weight.isnan().all()


def test_nothing_is_kept_over_a_sleep_that_keeps_everything():
    model = Attention()
    worker = worker_of(model)
    sleep._sleep(lambda worker, level: None, worker, 1)
    model._k_scale.data.fill_(4.0)

    sleep._wake_up(lambda worker, tags: None, worker)

    assert model._k_scale.item() == 4.0


@pytest.mark.parametrize(
    ("put_away", "back"),
    [
        (lambda worker: sleep._sleep(nothing, worker, 1), ["kv_cache"]),
        (lambda worker: sleep._sleep(nothing, worker, 2), None),
        (lambda worker: sleep._discard(nothing, worker, ("kv_cache",)), ["kv_cache", "weights"]),
    ],
    ids=["level 1", "level 2", "discarded"],
)
def test_a_kv_cache_that_is_put_away_is_lent_to_nobody(put_away: Any, back: Any):
    worker = worker_of(Attention())

    put_away(worker)
    sleep._wake_up(nothing, worker, ["weights"])
    assert CACHE_AWAY.get(worker)

    sleep._wake_up(nothing, worker, back)
    assert not CACHE_AWAY.get(worker)


def test_what_was_lent_of_a_kv_cache_is_given_back_before_it_is_discarded(
    monkeypatch: pytest.MonkeyPatch,
):
    seen, session = (
        [],
        SimpleNamespace(transactions=SimpleNamespace(give_back=lambda: seen.append("given back"))),
    )
    monkeypatch.setattr(sleep, "find_session", lambda model: session)

    sleep._discard(lambda *_: seen.append("discarded"), worker_of(Attention()), ("kv_cache",))

    assert seen == ["given back", "discarded"]


def nothing(*_: Any) -> None:
    """vLLM's own part."""
