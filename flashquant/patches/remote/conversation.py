"""One update in workers of other processes: all answers, or the one error that matters.

The workers agree among themselves (`flashquant.update.agreement`) whether the update is committed.
Here their answers become one report or one exception, and a worker that dies is
noticed by watching its process: the engine then goes down as a whole, and says
little about why.
"""

from __future__ import annotations

import asyncio
import contextlib
import functools
import threading
import time
import uuid
from collections.abc import Callable, Generator, Iterator, Mapping, Sequence
from concurrent.futures import Future, wait
from contextlib import contextmanager
from types import MappingProxyType
from typing import Any, NamedTuple, TypeVar

from pydantic import TypeAdapter

from flashquant import errors
from flashquant.errors import PeerFailed, ReloadError, TornWeights, WorkerLost
from flashquant.patches.seams import worker
from flashquant.update import KVScales, Member, ReloadReport

_T = TypeVar("_T")
_REPORT = TypeAdapter(ReloadReport)  # a worker's answer comes as plain data

_LOOK_EVERY = 0.05  # seconds
_SLICE = 0.01  # seconds of an update that is prepared, between two steps of the engine
_WITHOUT_A_BREAK = 86400.0
# What the last answer to a conversation may have been, or that nobody waits for it any more.
_ENDINGS = (Exception, asyncio.CancelledError, KeyboardInterrupt, SystemExit)
_BEFORE_THE_END = frozenset(
    {worker.BEGIN, worker.FEED, worker.CLOSE, worker.TRY_RELOAD, worker.TRY_APPLY_DELTA}
)
_GRACE = 5.0  # seconds between a worker's death and the last answer that can still come


class Call(NamedTuple):
    """What every worker is asked next."""

    method: str
    args: tuple[Any, ...] = ()
    kwargs: Mapping[str, Any] = MappingProxyType({})

    @property
    def is_before_the_end(self) -> bool:
        """Whether the update can still be broken off, if this is not asked."""
        return self.method in _BEFORE_THE_END or (self.method, self.args) == (worker.HOLD, (True,))


# Yields what to ask the workers, is sent their answers, and returns the report.
Conversation = Generator[Call, Sequence[Any], ReloadReport]


def conversation(
    path: str,
    *,
    atomic: bool,
    strict: bool,
    prepare: bool = False,
    kv_scales: KVScales | None = None,
    together: bool = False,
) -> Conversation:
    """What is said to the workers in one update, from safetensors at a path.

    Prepared, it is many short calls, between which the engine takes its steps; only one of them,
    the swap, is a pause.

    Args:
        path: a file or a folder.
        atomic, strict, prepare, kv_scales: as for `flashquant.reload_weights`.
        together: whether replicas compute each request together, as those of a mixture of experts
            do. None can wait for another inside a call, as ranks do: it may come to the call a step
            earlier, and that step is all of theirs. So all get what they need before any commits.

    Raises:
        ReloadError: what the first worker that failed has said, with its rank;
            every worker is on its old weights (or torn, with `atomic=False`).

    """
    options = {"atomic": atomic, "kv_scales": kv_scales}
    if not (prepare or together):
        call = Call(worker.TRY_RELOAD, (path,), {**options, "strict": strict})
        return _report(answers_of((yield call)))
    in_slices = _in_slices(path, options, strict=strict, prepare=prepare, together=together)
    report = yield from (_held(in_slices) if together and not prepare else in_slices)
    found = answers_of((yield Call(worker.DIGEST, (_SLICE,), {"anew": True})))
    while not all(done for done, _ in found):
        found = answers_of((yield Call(worker.DIGEST, (_SLICE,))))
    return report.with_digests([taken for _, taken in found])


def _in_slices(
    path: str, options: Mapping[str, Any], *, strict: bool, prepare: bool, together: bool
) -> Conversation:
    """Begin, some weights at a time, and the end."""
    own = {"word": uuid.uuid4().hex}  # another caller may begin one meanwhile
    close = _committed(Call(worker.CLOSE, (), {"strict": strict, **own}), together=together)
    feed = Call(worker.FEED, (_SLICE if prepare else _WITHOUT_A_BREAK,), own)
    try:
        answers_of((yield Call(worker.BEGIN, (path,), {**options, "prepares": prepare, **own})))
        while any(answers_of((yield feed))):
            pass
        return (yield from (_held(close) if together and prepare else close))
    except _ENDINGS:
        yield Call(worker.ABANDON, (), own)
        raise


def delta_conversation(path: str, *, together: bool = False) -> Conversation:
    """The same of a bundle of what changed, at a path.

    Raises:
        ReloadError: as `conversation`.

    """
    talk = _committed(Call(worker.TRY_APPLY_DELTA, (path,)), together=together)
    return (yield from (_held(talk) if together else talk))


def _held(talk: Conversation) -> Conversation:
    """The same, and no worker takes a step of a request before its end."""
    yield Call(worker.HOLD, (True,))
    try:
        report = yield from talk
    except _ENDINGS:
        yield Call(worker.HOLD, (False,))
        raise
    yield Call(worker.HOLD, (False,))
    return report


def _committed(call: Call, *, together: bool) -> Conversation:
    """A call by which each replica commits, or not."""
    answers = yield call
    try:
        return _report(answers_of(answers))
    except ReloadError as failure:
        if not together or all("error" in answer for answer in answers):
            raise
        yield Call(worker.TEAR)
        raise TornWeights(
            f"{failure} Other replicas had committed the update, and they compute each request "
            "together, so none is served. Push one complete update to all of them."
        ) from failure


def carry_out(llm: Any, talk: Conversation) -> ReloadReport:
    """One whole update of an `LLM` whose workers are elsewhere.

    Interrupted, what has been begun is taken back, and the interrupt goes on; a call that is a
    whole update may have come to stand, as where the workers are in this process.

    Raises:
        WorkerLost: a worker's process ended.

    """
    asked: list[Future[Sequence[Any]]] = []
    with _Watch(llm.collective_rpc(worker.MEMBER)) as watch:
        try:
            return _carried_out(llm, talk, watch, asked)
        except (KeyboardInterrupt, SystemExit) as interrupt:
            wait(asked, timeout=_GRACE)
            _break_off(llm, talk, interrupt)
            raise


def _carried_out(
    llm: Any, talk: Conversation, watch: _Watch, asked: list[Future[Sequence[Any]]]
) -> ReloadReport:
    """Args:
    asked: what the workers are asked at the moment, for whoever is interrupted.

    """
    answers: Sequence[Any] | None = None
    while True:
        try:
            ask = next(talk) if answers is None else talk.send(answers)
        except StopIteration as end:
            report: ReloadReport = end.value
            return report
        asked[:] = [answering := _in_a_thread(functools.partial(_ask, llm, ask))]
        while not answering.done():
            wait(asked, timeout=_LOOK_EVERY)
            watch.raise_if_lost_for(_GRACE)
        with watch.explaining():
            answers = answering.result()


def _break_off(llm: Any, talk: Conversation, interrupt: BaseException) -> None:
    """Ask what is left to be asked of workers when an update is not carried out."""
    with contextlib.suppress(type(interrupt), StopIteration):
        ask = talk.throw(interrupt)
        while True:
            ask = talk.send(_ask(llm, ask))


def _ask(llm: Any, ask: Call) -> Sequence[Any]:
    answers: Sequence[Any] = llm.collective_rpc(ask.method, args=ask.args, kwargs=dict(ask.kwargs))
    return answers


async def carry_out_async(engine: Any, talk: Conversation) -> ReloadReport:
    """The same for an `AsyncLLM`, between two steps of the engine.

    Cancelled, it ends when the workers have taken back what was begun. A call that lets the update
    stand is waited for: then it is too late, and the report is returned.
    """
    cancelled: list[asyncio.CancelledError] = []
    carrying = asyncio.ensure_future(_carried_out_async(engine, talk, cancelled))
    while True:
        try:
            return await asyncio.shield(carrying)
        except asyncio.CancelledError as cancel:
            if carrying.done():
                raise
            cancelled.append(cancel)


async def _carried_out_async(
    engine: Any, talk: Conversation, cancelled: Sequence[asyncio.CancelledError]
) -> ReloadReport:
    """Args:
    cancelled: empty until the caller wants no update any more.

    """
    with _Watch(await call(engine, worker.MEMBER)) as watch:
        answers: Sequence[Any] | None = None
        while True:
            try:
                ask = next(talk) if answers is None else talk.send(answers)
                if cancelled and ask.is_before_the_end:
                    ask = talk.throw(cancelled[0])
            except StopIteration as end:
                report: ReloadReport = end.value
                return report
            answering = asyncio.ensure_future(call(engine, ask.method, *ask.args, **ask.kwargs))
            try:
                while not answering.done():
                    await asyncio.wait([answering], timeout=_LOOK_EVERY)
                    watch.raise_if_lost_for(_GRACE)
                with watch.explaining():
                    answers = answering.result()
            finally:
                answering.cancel()  # no answer will come any more, or it is there


async def call(engine: Any, method: str, *args: Any, **kwargs: Any) -> list[Any]:
    """What every worker of an `AsyncLLM` answers, those of all its replicas.

    Its own `collective_rpc` reaches all replicas too, but returns the first one's; vLLM
    gathers all of them since 0.32 only, out of the same calls.
    """
    client = engine.engine_core
    calls = [
        client._call_utility_async("collective_rpc", method, None, args, kwargs, engine=replica)
        for replica in client.core_engines
    ]
    answers = await asyncio.gather(*calls)
    return [answer for replica in answers for answer in replica]


@contextmanager
def explaining_unpatched() -> Iterator[None]:
    """Say what to do where workers do not know flashquant's methods."""
    try:
        yield
    except Exception as failure:  # vLLM raises a bare one, or what the worker raised
        says = str(failure)
        unknown = "is not implemented" in says or "has no attribute" in says
        if isinstance(failure, ReloadError) or not unknown or worker.PREFIX not in says:
            raise
        raise ReloadError(
            "this engine is not looked after by flashquant: FLASHRL_CONFIG was not set when it was "
            "created, or not in the processes of its workers. Set it before vLLM is first used, in "
            "every process, and create the engine again."
        ) from failure


def answers_of(answers: Sequence[Mapping[str, Any]]) -> list[Any]:
    """What the workers answered, or the one error that matters."""
    failures = {rank: answer for rank, answer in enumerate(answers) if "error" in answer}
    if failures:
        raise _failure(failures, len(answers))
    return [answer["answer"] for answer in answers]


def _report(reports: Sequence[Any]) -> ReloadReport:
    return ReloadReport.of_workers([_REPORT.validate_python(report) for report in reports])


def _failure(failures: Mapping[int, Mapping[str, str]], size: int) -> ReloadError:
    """The error of a worker that failed by itself, rather than of one that followed it."""
    by_itself = {rank: a for rank, a in failures.items() if a["error"] != PeerFailed.__name__}
    rank, answer = next(iter((by_itself or failures).items()))
    kind = getattr(errors, answer["error"], None)
    says = answer["says"] if kind else f"{answer['error']}: {answer['says']}"
    if size > 1:
        says = f"rank {rank}: {says}"
    return kind(says) if kind and issubclass(kind, ReloadError) else ReloadError(says)


def _in_a_thread(call: Callable[[], _T]) -> Future[_T]:
    """Begin a call that may never return: vLLM's clients wait for ever for an engine that died."""
    answer: Future[_T] = Future()

    def run() -> None:
        try:
            answer.set_result(call())
        except BaseException as failure:
            answer.set_exception(failure)

    threading.Thread(target=run, name="flashquant-call", daemon=True).start()
    return answer


class _Watch:
    """A thread that notes which of the workers' processes ends first.

    The first one matters: as soon as one has died, vLLM ends the others.
    """

    def __init__(self, members: Sequence[Sequence[Any]]) -> None:
        self._members = [Member(*member) for member in members]
        self._lost: Member | None = None
        self._since = 0.0
        self._found, self._stopped = threading.Event(), threading.Event()
        self._thread = threading.Thread(target=self._look, name="flashquant-watch", daemon=True)

    def __enter__(self) -> _Watch:
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._stopped.set()
        self._thread.join()

    def raise_if_lost_for(self, seconds: float) -> None:
        """Raise WorkerLost when a worker died so long ago that nothing more will come."""
        if self._lost is not None and time.monotonic() - self._since > seconds:
            raise self._report(self._lost)

    @contextmanager
    def explaining(self) -> Iterator[None]:
        """Say which worker died, where the engine fails because one did."""
        try:
            yield
        except Exception as failure:  # vLLM's clients raise a bare one for a call that was cut
            self._found.wait(_GRACE)
            if self._lost is None:
                raise
            raise self._report(self._lost) from failure

    def _report(self, lost: Member) -> WorkerLost:
        return WorkerLost(
            f"rank {lost.rank} (process {lost.pid}) ended in the middle of an update. Nothing of "
            "the update is served: without all of its workers the engine is down as a whole. "
            "Start a new one; it will load its checkpoint, and takes the next update."
        )

    def _look(self) -> None:
        while not self._stopped.wait(_LOOK_EVERY):
            lost = next((member for member in self._members if member.gone), None)
            if lost is not None:
                self._lost, self._since = lost, time.monotonic()
                self._found.set()
                return
