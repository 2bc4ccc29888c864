"""One update in workers of other processes: all answers, or the one error that matters.

The workers agree among themselves (`flashquant.agree`) whether the update stands.
Here their answers become one report or one exception, and a worker that dies is
noticed by watching its process: the engine then goes down as a whole, and says
little about why.
"""

from __future__ import annotations

import asyncio
import threading
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import Future, wait
from contextlib import contextmanager
from typing import Any, TypeVar

from pydantic import TypeAdapter

from flashquant import errors
from flashquant.errors import PeerFailed, ReloadError, WorkerLost
from flashquant.members import Member
from flashquant.patches import worker
from flashquant.report import ReloadReport

_T = TypeVar("_T")
_REPORT = TypeAdapter(ReloadReport)  # a worker's answer comes as plain data

_LOOK_EVERY = 0.05  # seconds
_GRACE = 5.0  # seconds between a worker's death and the last answer that can still come


def reload(llm: Any, path: str, *, atomic: bool, strict: bool) -> ReloadReport:
    """One whole update of an `LLM` whose workers are elsewhere, from safetensors at a path.

    Raises:
        ReloadError: what the first worker that failed has said, with its rank;
            every worker is on its old weights (or torn, with `atomic=False`).
        WorkerLost: a worker's process ended.

    """
    with _Watch(llm.collective_rpc(worker.MEMBER)) as watch:
        answering = _in_a_thread(
            lambda: llm.collective_rpc(
                worker.TRY_RELOAD, args=(path,), kwargs={"atomic": atomic, "strict": strict}
            )
        )
        while not answering.done():
            wait([answering], timeout=_LOOK_EVERY)
            watch.raise_if_lost_for(_GRACE)
        with watch.explaining():
            answers = answering.result()
    return _merged(answers)


async def reload_async(engine: Any, path: str, *, atomic: bool, strict: bool) -> ReloadReport:
    """The same for an `AsyncLLM`, between two steps of the engine."""
    with _Watch(await call(engine, worker.MEMBER)) as watch:
        answering = asyncio.ensure_future(
            call(engine, worker.TRY_RELOAD, path, atomic=atomic, strict=strict)
        )
        try:
            while not answering.done():
                await asyncio.wait([answering], timeout=_LOOK_EVERY)
                watch.raise_if_lost_for(_GRACE)
            with watch.explaining():
                answers = answering.result()
        finally:
            answering.cancel()  # no answer will come any more, or it is there
    return _merged(answers)


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


def _merged(answers: Sequence[Mapping[str, Any]]) -> ReloadReport:
    failures = {rank: answer for rank, answer in enumerate(answers) if "error" in answer}
    if failures:
        raise _failure(failures, len(answers))
    return ReloadReport.of_workers(
        [_REPORT.validate_python(answer["report"]) for answer in answers]
    )


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
        """Say who died, where the engine fails because somebody did."""
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
