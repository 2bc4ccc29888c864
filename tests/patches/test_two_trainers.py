"""Two trainers push to one engine at once: one policy is served, never the rest of the other."""

from __future__ import annotations

from types import SimpleNamespace

import pytest

from tests.support.fake_engine import NEW, OLD, FakeEngine, fresh, serves, serving

reload = pytest.importorskip("flashquant.patches.seams.reload")
HALF = len(NEW) // 2


@pytest.fixture
def engine(monkeypatch):
    engine = FakeEngine()
    session = engine.session = serving(engine)
    monkeypatch.setattr(reload, "find_session", lambda model: session)
    return engine


@pytest.fixture
def worker():
    transfer = SimpleNamespace(model=None, reset_weight_update_target=lambda: None)
    return SimpleNamespace(weight_transfer_engine=transfer, _weight_update_active=False)


def start(engine, worker):
    reload._start_weight_update(lambda _: engine.session.begin(), worker)


def update(engine, worker, weights):
    reload._update_weights(lambda _, sent: engine.session.push(sent), worker, weights)


def finish(engine, worker):
    reload._finish_weight_update(lambda _: engine.session.finish(), worker)


@pytest.mark.parametrize("goes_on", ["with more", "to its end"])
@pytest.mark.parametrize("other", ["a whole update", "a bracket of its own"])
def test_an_update_that_another_one_came_into_is_over(engine, worker, goes_on, other):
    pairs = list(NEW.items())
    start(engine, worker)
    update(engine, worker, pairs[:HALF])
    if other == "a whole update":
        engine.session.reload(OLD)
    else:
        engine.session.begin()

    act, more = (update, (pairs[HALF:],)) if goes_on == "with more" else (finish, ())
    with pytest.raises(reload.ReloadError, match="under way no more"):
        act(engine, worker, *more)

    assert serves(engine, fresh(OLD))
    if other == "a bracket of its own":  # which is not ended by that
        engine.session.push(list(OLD.items()))
        engine.session.finish(strict=True)


def test_one_that_nobody_came_into_is_served(engine, worker):
    pairs = list(NEW.items())
    for _ in range(2):
        start(engine, worker)
        update(engine, worker, pairs[:HALF])
        update(engine, worker, pairs[HALF:])
        finish(engine, worker)

    assert serves(engine, fresh(NEW))


def test_one_that_failed_begins_anew(engine, worker):
    start(engine, worker)
    with pytest.raises(reload.ReloadError, match="nowhere"):
        update(engine, worker, [("nowhere.weight", NEW["norm.weight"])])

    start(engine, worker)
    update(engine, worker, list(NEW.items()))
    finish(engine, worker)

    assert serves(engine, fresh(NEW))
