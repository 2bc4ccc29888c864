"""One update in workers of other processes: all answers, or the one error that matters.

The workers agree among themselves (`flashquant.agree`) whether the update stands.
Here their answers become one report or one exception, and a worker that dies is
noticed by watching its process: the engine then goes down as a whole, and says
little about why.
"""

from __future__ import annotations

import threading
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

from flashquant import errors
from flashquant.errors import PeerFailed, ReloadError, WorkerLost
from flashquant.members import Member
from flashquant.patches import worker as worker_methods
from flashquant.report import ReloadReport

_LOOK_EVERY = 0.05  # seconds
_GRACE = 5.0  # seconds in which a worker's death must show after its engine has failed


def reload(llm: Any, path: str, *, atomic: bool, strict: bool) -> ReloadReport:
    """One whole update of an engine in other processes, from safetensors at a path.

    Raises:
        ReloadError: what the first worker that failed has said, with its rank;
            every worker is on its old weights (or torn, with `atomic=False`).
        WorkerLost: a worker's process ended.

    """
    with _watching(llm):
        answers = llm.collective_rpc(
            worker_methods.TRY_RELOAD, args=(path,), kwargs={"atomic": atomic, "strict": strict}
        )
    failures = {rank: answer for rank, answer in enumerate(answers) if "error" in answer}
    if failures:
        raise _failure(failures, len(answers))
    return ReloadReport.of_workers([ReloadReport(**answer["report"]) for answer in answers])


def _failure(failures: Mapping[int, Mapping[str, str]], size: int) -> ReloadError:
    """The error of a worker that failed by itself, rather than of one that followed it."""
    by_itself = {rank: a for rank, a in failures.items() if a["error"] != PeerFailed.__name__}
    rank, answer = next(iter((by_itself or failures).items()))
    kind = getattr(errors, answer["error"], None)
    says = answer["says"] if kind else f"{answer['error']}: {answer['says']}"
    if size > 1:
        says = f"rank {rank}: {says}"
    return kind(says) if kind and issubclass(kind, ReloadError) else ReloadError(says)


@contextmanager
def _watching(llm: Any) -> Iterator[None]:
    """Say which worker died, if the engine fails because one did."""
    members = [Member(*answer) for answer in llm.collective_rpc(worker_methods.MEMBER)]
    watch = _Watch(members)
    try:
        yield
    except Exception as failure:  # vLLM's clients raise a bare one for a call that was cancelled
        lost = watch.first_gone(wait=_GRACE)
        if lost is None:
            raise
        raise WorkerLost(
            f"rank {lost.rank} (process {lost.pid}) ended in the middle of an update. Nothing of "
            "the update is served: without all of its workers the engine is down as a whole. "
            "Start a new one; it will load its checkpoint, and takes the next update."
        ) from failure
    finally:
        watch.stop()


class _Watch:
    """A thread that notes which of some processes ends first.

    The first one matters: as soon as one has died, vLLM ends the others.
    """

    def __init__(self, members: Sequence[Member]) -> None:
        self._members = members
        self._gone: Member | None = None
        self._found, self._stopped = threading.Event(), threading.Event()
        self._thread = threading.Thread(target=self._look, name="flashquant-watch", daemon=True)
        self._thread.start()

    def first_gone(self, *, wait: float) -> Member | None:
        """Whose process ended first; waits some seconds for one that is just ending."""
        self._found.wait(wait)
        return self._gone

    def stop(self) -> None:
        self._stopped.set()
        self._thread.join()

    def _look(self) -> None:
        while not self._stopped.wait(_LOOK_EVERY):
            gone = next((member for member in self._members if member.gone), None)
            if gone is not None:
                self._gone = gone
                self._found.set()
                return
