"""Weights that the engine has put away cannot be written, and some do not come back.

sleep(1)             weights move to host memory and come back as they were
sleep(2), discard    their memory is given up; what comes back holds anything
reset_weights        vLLM's weight checker sets them to zero, to see an update come
"""

from __future__ import annotations

from typing import Any

from flashquant.patches.loading import find_session, models_of
from flashquant.patches.point import PatchPoint
from flashquant.session import Session

_WEIGHTS = "weights"


def _sleep(original: Any, worker: Any, level: int = 1) -> None:
    for session in _sessions(worker):
        session.sleep(keeps_weights=level < 2)
    original(worker, level)


def _discard(original: Any, worker: Any, tags: tuple[str, ...]) -> None:
    if _WEIGHTS in tags:
        for session in _sessions(worker):
            session.sleep(keeps_weights=False)
    original(worker, tags)


def _wake_up(original: Any, worker: Any, tags: list[str] | None = None) -> None:
    original(worker, tags)
    if tags is None or _WEIGHTS in tags:
        for session in _sessions(worker):
            session.wake_up()


def _reset_weights(original: Any, worker: Any) -> None:
    session = find_session(worker.get_model())
    if session is not None:
        session.overwritten()
    original(worker)


def _sessions(worker: Any) -> list[Session]:
    """Those of the model, and of its speculative draft."""
    found = (find_session(model) for model in models_of(worker))
    return [session for session in found if session is not None]


_WORKER = "vllm.v1.worker.gpu_worker:Worker"

POINTS = (
    PatchPoint(f"{_WORKER}.sleep", expects=("self", "level"), wrapper=_sleep),
    PatchPoint(f"{_WORKER}.wake_up", expects=("self", "tags"), wrapper=_wake_up),
    PatchPoint(f"{_WORKER}.discard", expects=("self", "tags"), wrapper=_discard, within=">=0.31"),
    PatchPoint(
        f"{_WORKER}.reset_weights", expects=("self",), wrapper=_reset_weights, within=">=0.32"
    ),
)
