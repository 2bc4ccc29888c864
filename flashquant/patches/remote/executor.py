"""A call that fails in one worker leaves no answers of the others behind.

vLLM's multiprocess executor reads the workers' answers one after the other, and
raises at the first failure. What the others have answered stays in their queues,
where every later call takes it for its own, one call too late, for good. A refused
update is an ordinary thing here, so the rest is read first.
"""

from __future__ import annotations

from typing import Any

from flashquant.patches.point import PatchPoint

_PATIENCE = 60.0  # seconds; a worker that goes back with the others answers at once


class _Answers:
    """One worker's queue of answers, which remembers whether it was read."""

    def __init__(self, queue: Any) -> None:
        self._queue = queue
        self.read = False

    def dequeue(self, timeout: float | None = None) -> Any:
        self.read = True
        return self._queue.dequeue(timeout=timeout)

    def __getattr__(self, name: str) -> Any:
        # vLLM's watching thread may shut the queues down in the middle of a call.
        return getattr(self._queue, name)


def _collective_rpc(original: Any, executor: Any, *args: Any, **kwargs: Any) -> Any:
    queues = executor.response_mqs
    if kwargs.get("non_block") or kwargs.get("unique_reply_rank") is not None:
        return original(executor, *args, **kwargs)
    answers = [_Answers(queue) for queue in queues]
    executor.response_mqs = answers
    try:
        return original(executor, *args, **kwargs)
    except RuntimeError:
        if not executor.is_failed:
            _read_the_rest(answers)
        raise
    finally:
        executor.response_mqs = queues


def _read_the_rest(answers: list[_Answers]) -> None:
    for answer in answers:
        # None was read: the call itself did not go out.
        if not answer.read and answers[0].read:
            answer.dequeue(timeout=_PATIENCE)


POINTS = (
    PatchPoint(
        "vllm.v1.executor.multiproc_executor:MultiprocExecutor.collective_rpc",
        expects=(
            "self",
            "method",
            "timeout",
            "args",
            "kwargs",
            "non_block",
            "unique_reply_rank",
            ...,
        ),
        wrapper=_collective_rpc,
    ),
)
