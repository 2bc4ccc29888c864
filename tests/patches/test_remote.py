"""Many workers' answers become one report, or the one error that matters."""

from __future__ import annotations

import _thread
import asyncio
import threading
from dataclasses import asdict
from typing import Any, ClassVar

import pytest

from flashquant.errors import MisfitTensor, PeerFailed, ReloadError, TornWeights, WorkerLost
from flashquant.patches.remote import conversation as remote
from flashquant.patches.seams import worker
from flashquant.update import Member
from tests.update.test_report import a_report

REFUSED = {"error": "MisfitTensor", "says": "q.weight holds NaN"}
FOLLOWED = {"error": "PeerFailed", "says": "rank 1 did not commit"}
CRASHED = {"error": "OSError", "says": "disk"}


class Llm:
    """An engine whose workers answer what they are told to."""

    def __init__(self, *answers: Any, members: list[Member] | None = None) -> None:
        self._answers = answers
        self._members = members or [Member.here(rank) for rank in range(len(answers))]

    def collective_rpc(self, method: str, *args: Any, **kwargs: Any) -> list[Any]:
        if method == worker.MEMBER:
            return [tuple(member) for member in self._members]
        if isinstance(self._answers[0], Exception):
            raise self._answers[0]
        return list(self._answers)


def reload(*answers: Any, **kwargs: Any) -> Any:
    return remote.carry_out(
        Llm(*answers, **kwargs), remote.conversation("/path", atomic=True, strict=True)
    )


def together(prepare: bool, **told: list[dict[str, Any]]) -> tuple[list[Any], Any]:
    """What two replicas that share experts are asked, and how it ends; `told` by method."""
    done = {"answer": False}
    answers = {
        worker.BEGIN: [done] * 2,
        worker.FEED: [done] * 2,
        worker.CLOSE: [{"answer": asdict(a_report(ranks=("a",)))}] * 2,
        worker.DIGEST: [{"answer": (True, "d")}] * 2,
        **told,
    }
    talk = remote.conversation("/p", atomic=True, strict=True, prepare=prepare, together=True)
    asked, answer = [], None
    try:
        while True:
            call = talk.send(answer)
            asked.append((call.method, *call.args) if call.method == worker.HOLD else call.method)
            answer = answers.get(call.method, [None, None])
    except StopIteration as end:
        return asked, end.value
    except ReloadError as failure:
        return asked, failure


HELD, RELEASED = (worker.HOLD, True), (worker.HOLD, False)


@pytest.mark.parametrize("prepare", [False, True])
def test_replicas_that_compute_together_hold_their_steps_while_any_may_differ(prepare):
    """A prepared update differs only while it is swapped in."""
    asked, report = together(prepare)

    assert report.ranks == ("d", "d")
    begun = [worker.BEGIN, worker.FEED]
    order = [*begun, HELD] if prepare else [HELD, *begun]
    assert asked == [*order, worker.CLOSE, RELEASED, worker.DIGEST]


def test_what_one_of_them_refuses_is_taken_back_by_all_before_any_goes_on():
    asked, failure = together(False, flashquant_feed=[{"answer": False}, REFUSED])

    assert isinstance(failure, MisfitTensor)
    assert asked == [HELD, worker.BEGIN, worker.FEED, worker.ABANDON, RELEASED]


def test_where_some_have_committed_none_is_served():
    """It is too late to go back, and each request would be computed by both policies."""
    stood = {"answer": asdict(a_report(ranks=("a",)))}
    asked, failure = together(False, flashquant_close=[stood, CRASHED])

    assert isinstance(failure, TornWeights)
    assert "Push one complete update to all of them" in str(failure)
    assert asked[-4:] == [worker.CLOSE, worker.TEAR, worker.ABANDON, RELEASED]
    asked, failure = together(False, flashquant_close=[FOLLOWED, CRASHED])
    assert worker.TEAR not in asked


def test_the_error_of_the_worker_that_failed_by_itself_is_raised():
    with pytest.raises(MisfitTensor, match=r"^rank 1: q\.weight holds NaN"):
        reload(FOLLOWED, REFUSED, FOLLOWED)


def test_an_error_that_is_not_ours_keeps_its_name():
    with pytest.raises(ReloadError, match="rank 0: OSError: disk"):
        reload(CRASHED, FOLLOWED)


def test_workers_that_only_followed_say_whom():
    with pytest.raises(PeerFailed, match="rank 1 did not commit"):
        reload(FOLLOWED, FOLLOWED)


def test_the_only_worker_needs_no_rank():
    with pytest.raises(MisfitTensor, match=r"^q\.weight holds NaN"):
        reload(REFUSED)


def test_reports_become_one():
    slow, fast = a_report(seconds=2.0, ranks=("a",)), a_report(seconds=1.0, ranks=("b",))

    report = reload({"answer": asdict(slow)}, {"answer": asdict(fast)})

    assert report.seconds == 2.0
    assert report.ranks == ("a", "b")
    assert report.bytes_out == 2 * slow.bytes_out
    assert report.digest not in ("a", "b", None)


def test_a_worker_that_died_is_named():
    dead = Member.here(1)._replace(started=1.0)

    with pytest.raises(WorkerLost, match=r"rank 1 \(process \d+\) ended.*Start a new one") as lost:
        reload(RuntimeError("cancelled"), members=[Member.here(0), dead])

    assert isinstance(lost.value.__cause__, RuntimeError)


def test_a_call_that_never_returns_is_given_up_when_a_worker_has_died(monkeypatch):
    monkeypatch.setattr(remote, "_GRACE", 0.2)
    dead = Member.here(0)._replace(started=1.0)
    llm = Llm({}, members=[dead])
    answer = llm.collective_rpc
    forever = threading.Event()
    llm.collective_rpc = lambda method, *args, **kwargs: (
        answer(method) if method == worker.MEMBER else forever.wait()
    )

    with pytest.raises(WorkerLost, match="rank 0"):
        remote.carry_out(llm, remote.conversation("/path", atomic=True, strict=True))
    forever.set()


def test_an_error_of_the_engine_itself_passes_through(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(remote, "_GRACE", 0.1)

    with pytest.raises(RuntimeError, match="cancelled"):
        reload(RuntimeError("cancelled"))


class Async:
    """An `AsyncLLM` whose workers answer when they are let to; what was asked is noted."""

    def __init__(self) -> None:
        self.asked: list[Any] = []
        self.core_engines = ["replica"]
        self.engine_core = self
        self.open: asyncio.Event | None = None
        self.reached: asyncio.Event | None = None

    async def _call_utility_async(self, _: str, method: str, *args: Any, engine: Any) -> list[Any]:
        if method == worker.MEMBER:
            return [tuple(Member.here(0))]
        self.asked.append(method)
        if self.reached is not None and method == self.stops_at:
            self.reached.set()
            await self.open.wait()
        stood = {"answer": asdict(a_report(ranks=("a",)))}
        done = {worker.DIGEST: {"answer": (True, "d")}, worker.BEGIN: {"answer": True}}
        end = {worker.TRY_RELOAD: stood, worker.CLOSE: stood, worker.FEED: {"answer": False}}
        return [{**done, **end}.get(method)]


@pytest.mark.parametrize(
    ("options", "stops_at", "asked", "stands"),
    [
        ({}, worker.TRY_RELOAD, [worker.TRY_RELOAD], True),
        ({"prepare": True}, worker.BEGIN, [worker.BEGIN, worker.ABANDON], False),
        ({"prepare": True}, worker.FEED, [worker.BEGIN, worker.FEED, worker.ABANDON], False),
        (
            {"prepare": True},
            worker.CLOSE,
            [worker.BEGIN, worker.FEED, worker.CLOSE, worker.DIGEST],
            True,
        ),
        (
            {"together": True},
            worker.FEED,
            [worker.HOLD, worker.BEGIN, worker.FEED, worker.ABANDON, worker.HOLD],
            False,
        ),
    ],
)
def test_an_update_that_is_cancelled_is_taken_back_or_stands_and_says_so(
    options, stops_at, asked, stands
):
    """By `asyncio.wait_for`, say: steps of the engine are not held, nor memory, for ten minutes."""

    async def run() -> ReloadError | Any:
        engine = Async()
        engine.stops_at, engine.open, engine.reached = stops_at, asyncio.Event(), asyncio.Event()
        talk = remote.conversation("/path", atomic=True, strict=True, **options)
        task = asyncio.ensure_future(remote.carry_out_async(engine, talk))
        await engine.reached.wait()
        task.cancel()
        await asyncio.sleep(0)
        engine.open.set()
        (outcome,) = await asyncio.gather(task, return_exceptions=True)
        return engine.asked, outcome

    found, outcome = asyncio.run(run())
    assert found == asked
    assert isinstance(outcome, asyncio.CancelledError) is not stands


def test_an_interrupt_takes_back_what_was_begun_in_workers():
    class Interrupted(Llm):
        asked: ClassVar[list[str]] = []

        def collective_rpc(self, method: str, *args: Any, **kwargs: Any) -> list[Any]:
            if method != worker.MEMBER:
                self.asked.append(method)
            if method == worker.FEED:
                _thread.interrupt_main()
            return super().collective_rpc(method)

    talk = remote.conversation("/path", atomic=True, strict=True, prepare=True)
    with pytest.raises(KeyboardInterrupt):
        remote.carry_out(Interrupted({"answer": True}), talk)
    assert Interrupted.asked[-1] == worker.ABANDON
