"""An update that its trainer has left is rolled back after a while, and cannot be gone on with."""

from __future__ import annotations

import logging

import pytest

from flashquant.config.checks import Checks
from flashquant.errors import ReloadError
from flashquant.update import Session
from tests.support.fake_engine import NEW, OLD, FakeEngine, fresh, only, serves, serving


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> list[float]:
    """The seconds that `time.monotonic` says."""
    now = [100.0]
    for module in ("flashquant.update.transaction", "flashquant.update.state"):
        monkeypatch.setattr(f"{module}.time.monotonic", lambda: now[0])
    return now


@pytest.fixture
def engine() -> FakeEngine:
    return FakeEngine()


def half_an_update(engine: FakeEngine, seconds: float = 10) -> Session:
    session = serving(engine, checks=Checks(bracket_timeout=seconds))
    session.begin()
    session.push(only("norm.weight", "q.weight"))
    return session


def test_nothing_is_rolled_back_before_its_time(engine: FakeEngine, clock: list[float]) -> None:
    """It counts from the last tensor, not from the beginning."""
    session = half_an_update(engine)

    for _ in range(5):
        clock[0] += 9
        session.transactions.take_back_what_was_left()
        session.push(only())
        assert session.transactions.quiet == 0
    session.push(only("k.weight"))
    session.finish()

    assert serves(engine, fresh(NEW))


def test_old_weights_are_served_afterwards_and_the_log_says_so(
    engine: FakeEngine, clock: list[float], caplog: pytest.LogCaptureFixture
) -> None:
    """Once, as an error."""
    session = half_an_update(engine)
    assert session.transactions.holds_steps
    clock[0] += 10

    with caplog.at_level(logging.ERROR, "flashquant"):
        session.transactions.take_back_what_was_left()
        session.transactions.take_back_what_was_left()

    assert (session.transactions.holds_steps, session.transactions.quiet) == (False, None)
    session.check_servable()
    assert serves(engine, fresh(OLD))
    (said,) = caplog.messages
    assert "nothing has come of it for 10 seconds (FLASHQUANT_BRACKET_TIMEOUT=10)" in said


def test_the_other_half_is_refused_until_an_update_begins_anew(
    engine: FakeEngine, clock: list[float]
) -> None:
    """As a push of its own it would go live, layer by layer."""
    session = half_an_update(engine)
    clock[0] += 11
    session.transactions.take_back_what_was_left()

    with pytest.raises(ReloadError, match="begin a new one"):
        session.push(only("k.weight"))
    with pytest.raises(ReloadError, match="no update is under way"):
        session.finish()
    assert serves(engine, fresh(OLD))
    session.reload(NEW)

    assert serves(engine, fresh(NEW))


def test_zero_waits_for_ever(engine: FakeEngine, clock: list[float]) -> None:
    """As the variable promises."""
    session = half_an_update(engine, seconds=0)
    clock[0] += 1e9

    session.transactions.take_back_what_was_left()

    assert session.transactions.holds_steps


def test_without_an_undo_log_the_engine_is_torn_and_says_what_heals_it(
    engine: FakeEngine, clock: list[float]
) -> None:
    """There is nothing to go back to."""
    session = serving(engine, checks=Checks(bracket_timeout=10))
    session.begin(atomic=False)
    session.push(only("norm.weight"))
    clock[0] += 10

    session.transactions.take_back_what_was_left()

    assert session.transactions.serving.torn
    session.reload(NEW)
    assert serves(engine, fresh(NEW))


def test_steps_that_are_held_for_others_go_on_after_a_while(
    engine: FakeEngine, clock: list[float]
) -> None:
    """Also where nothing has begun here, or what was begun has failed already."""
    session = half_an_update(engine)
    session.transactions.hold(True)
    clock[0] += 9
    session.push(only("k.weight"))
    session.abandon()
    clock[0] += 9
    session.transactions.take_back_what_was_left()
    assert session.transactions.holds_steps
    clock[0] += 1

    session.transactions.take_back_what_was_left()

    assert (session.transactions.holds_steps, session.transactions.quiet) == (False, None)
