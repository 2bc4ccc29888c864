"""New methods on every worker, so that `collective_rpc` reaches the session by name.

They take and return what any of vLLM's transports can carry: an in-process
engine passes tensors through, any other one a path and plain data.

A worker that raised would end vLLM's own call with the answers of the others
unread, so across processes a failure travels as an answer too.
"""

from __future__ import annotations

import logging
from collections.abc import Callable
from dataclasses import asdict
from typing import Any

from flashquant.members import Member
from flashquant.patches.loading import session_of, standing_of
from flashquant.patches.point import PatchPoint
from flashquant.report import ReloadReport
from flashquant.weights import Weights

logger = logging.getLogger(__name__)


def _reload(worker: Any, weights: Weights, atomic: bool = True, strict: bool = True) -> Any:
    """One whole update of this worker's model; `flashquant.ReloadReport`, or raises."""
    return session_of(worker.get_model()).reload(weights, atomic=atomic, strict=strict)


def _try_reload(
    worker: Any, weights: Weights, atomic: bool = True, strict: bool = True
) -> dict[str, Any]:
    """The same: `{"report": ...}` as plain data, or `{"error": class, "says": message}`."""
    try:
        report: ReloadReport = _reload(worker, weights, atomic, strict)
    except Exception as failure:  # whatever it is, the front end raises it
        logger.exception("this worker's update failed and was rolled back")
        return {"error": type(failure).__name__, "says": str(failure)}
    return {"report": asdict(report)}


def _status(worker: Any) -> dict[str, Any]:
    """`flashquant.Status` of this worker's model, as plain data."""
    return asdict(session_of(worker.get_model()).status())


def _member(worker: Any) -> tuple[Any, ...]:
    """Which process this is: a `Member`, as plain data."""
    return tuple(Member.here(session_of(worker.get_model()).rank))


def _standing(worker: Any) -> tuple[Any, ...]:
    """How this worker's weights stand: a `Standing`, as plain data."""
    return tuple(standing_of(worker.get_model()))


RELOAD = "flashquant_reload"
TRY_RELOAD = "flashquant_try_reload"
STATUS = "flashquant_status"
MEMBER = "flashquant_member"
STANDING = "flashquant_standing"

_METHODS: dict[str, Callable[..., Any]] = {
    RELOAD: _reload,
    TRY_RELOAD: _try_reload,
    STATUS: _status,
    MEMBER: _member,
    STANDING: _standing,
}

POINTS = tuple(
    PatchPoint(f"vllm.v1.worker.gpu_worker:Worker.{name}", expects=None, wrapper=method)
    for name, method in _METHODS.items()
)
