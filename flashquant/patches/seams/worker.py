"""New methods on every worker, so that `collective_rpc` reaches the session by name.

They take and return what any of vLLM's transports can carry: an in-process
engine passes tensors through, any other one a path and plain data.

A worker that raised would end vLLM's own call with the answers of the others
unread, so across processes a failure travels as an answer too.
"""

from __future__ import annotations

import contextlib
import logging
import time
import weakref
from collections.abc import Callable, Iterator
from dataclasses import asdict, replace
from typing import Any

from torch import Tensor

from flashquant.errors import ReloadError
from flashquant.patches import channels
from flashquant.patches.point import PatchPoint
from flashquant.patches.seams.lending import LEND, TAKE_BACK, end_loan, lend_here, take_back_here
from flashquant.patches.seams.loading import (
    deltas_of,
    find_session,
    models_of,
    session_of,
    standing_of,
    take_forgotten,
)
from flashquant.plan import Weights, named_tensors, naming_the_file
from flashquant.update import KVScales, Member, ReloadReport, Session

logger = logging.getLogger(__name__)


def _reload(
    worker: Any,
    weights: Weights,
    atomic: bool = True,
    strict: bool = True,
    prepare: bool = False,
    kv_scales: KVScales | None = None,
) -> Any:
    """One whole update of this worker's model; `flashquant.ReloadReport`, or raises."""
    session = session_of(worker.get_model())
    return session.reload(
        weights, atomic=atomic, strict=strict, prepare=prepare, kv_scales=kv_scales
    )


def _answering(method: Callable[..., Any]) -> Callable[..., dict[str, Any]]:
    """The same method: `{"answer": ...}`, or `{"error": class, "says": message}`."""

    def answer(worker: Any, *args: Any, **kwargs: Any) -> dict[str, Any]:
        try:
            result = method(worker, *args, **kwargs)
        except Exception as failure:  # whatever it is, the front end raises it
            if not isinstance(failure, ReloadError):  # the session has said those
                logger.exception("this worker's update failed and was rolled back")
            return {"error": type(failure).__name__, "says": str(failure)}
        return {"answer": asdict(result) if isinstance(result, ReloadReport) else result}

    return answer


def _begin(
    worker: Any,
    weights: Weights,
    atomic: bool = True,
    kv_scales: KVScales | None = None,
    prepares: bool = True,
    word: str = "",
) -> bool:
    """Begin an update that is taken in slices: while the engine generates, if it is prepared.

    Args:
        word: of the caller, who has to say it with each slice: another one may come between.

    """
    session = session_of(worker.get_model())
    update = session.begin(atomic=atomic, prepares=prepares, kv_scales=kv_scales)
    feed = named_tensors(weights, reuses=True)
    channels.FEED.put(worker, channels.Feed(word, weakref.ref(update), feed))
    return True


def _begun(worker: Any, session: Session, word: str) -> Iterator[tuple[str, Tensor]]:
    """What is still to come of the update that was begun with this word.

    Raises:
        ReloadError: another one has taken its place.

    """
    feed = channels.FEED.get(worker)
    mine = feed is not None and feed.word == word
    session.transactions.check_current(feed.update() if feed is not None and mine else None)
    return feed.tensors if feed is not None else iter(())


def _feed(worker: Any, seconds: float, word: str = "") -> bool:
    """Take weights for about so long; False when there is nothing left."""
    session = session_of(worker.get_model())
    feed = _begun(worker, session, word)
    until, left = time.perf_counter() + seconds, True

    def some() -> Iterator[tuple[str, Tensor]]:
        nonlocal left
        for pair in feed:
            yield pair
            if time.perf_counter() > until:
                return
        left = False

    try:
        session.push(some())
    except ReloadError as failure:
        raise naming_the_file(failure, feed) from failure.__cause__
    return left


def _close(worker: Any, strict: bool = True, word: str = "") -> Any:
    """Commit; what was prepared goes live, and that is the pause."""
    session = session_of(worker.get_model())
    _begun(worker, session, word)
    return session.close(strict=strict)


def _abandon(worker: Any, word: str = "") -> None:
    """An update that will not be finished."""
    session = session_of(worker.get_model())
    with contextlib.suppress(ReloadError):  # another one is none of its business
        _begun(worker, session, word)
        session.abandon()


def _hold(worker: Any, held: bool) -> None:
    """Take no step of a request; or take them again."""
    session_of(worker.get_model()).transactions.hold(held)


def _tear(worker: Any) -> None:
    """Workers that compute one request hold different policies."""
    session_of(worker.get_model()).overwritten()


def _digest(worker: Any, seconds: float, *, anew: bool = False) -> tuple[bool, str | None]:
    """Take the digest for about so long: whether that was the end of it, and what it is."""
    session = session_of(worker.get_model())
    if anew:
        proofs = session.proofs
        proofs.audit()
        channels.DIGESTING.put(worker, proofs.digesting() if proofs.checks.digest else iter(()))
    until = time.perf_counter() + seconds
    for found in channels.DIGESTING.of(worker):
        if found is not None or time.perf_counter() > until:
            return found is not None, found
    return True, None


def _status(worker: Any) -> dict[str, Any]:
    """`flashquant.Status` of this worker's model, as plain data."""
    model, *drafts = models_of(worker)
    found = {type(d).__name__: s.version for d in drafts if (s := find_session(d)) is not None}
    return asdict(replace(session_of(model).status(), drafts=found))


def _manifest(worker: Any) -> dict[str, Any]:
    """`flashquant.sender.Manifest` of this worker's model, as plain data."""
    return deltas_of(worker.get_model()).manifest().model_dump(mode="json")


def _apply_delta(worker: Any, delta: Any) -> ReloadReport:
    """One update by a `flashquant.sender.Delta`, or by the path of one."""
    return deltas_of(worker.get_model()).apply(delta)


def _member(worker: Any) -> tuple[Any, ...]:
    """Which process this is: a `Member`, as plain data."""
    return tuple(Member.here(session_of(worker.get_model()).rank))


def _standing(worker: Any) -> tuple[Any, ...]:
    """How this worker's weights stand: a `Standing`, as plain data.

    What the engine core has lent is its own again where no update is under way.
    """
    standing = standing_of(worker)
    if not standing.holds_steps:
        end_loan(worker)
    return tuple(standing)


def _forget(worker: Any) -> None:
    """This worker's half of what was made of old weights; the engine core drops the other."""
    worker.model_runner.reset_encoder_cache()
    take_forgotten(worker)


PREFIX = "flashquant_"
RELOAD = "flashquant_reload"
TRY_RELOAD = "flashquant_try_reload"
APPLY_DELTA = "flashquant_apply_delta"
TRY_APPLY_DELTA = "flashquant_try_apply_delta"
BEGIN = "flashquant_begin"
FEED = "flashquant_feed"
CLOSE = "flashquant_close"
ABANDON = "flashquant_abandon"
HOLD = "flashquant_hold"
TEAR = "flashquant_tear"
DIGEST = "flashquant_digest"
STATUS = "flashquant_status"
MANIFEST = "flashquant_manifest"
MEMBER = "flashquant_member"
STANDING = "flashquant_standing"
FORGET = "flashquant_forget"

# Calls that are one whole update: vLLM's own, too.
UPDATES = frozenset({RELOAD, TRY_RELOAD, APPLY_DELTA, TRY_APPLY_DELTA, "reload_weights"})

_METHODS: dict[str, Callable[..., Any]] = {
    RELOAD: _reload,
    TRY_RELOAD: _answering(_reload),
    APPLY_DELTA: _apply_delta,
    TRY_APPLY_DELTA: _answering(_apply_delta),
    BEGIN: _answering(_begin),
    FEED: _answering(_feed),
    CLOSE: _answering(_close),
    ABANDON: _abandon,
    HOLD: _hold,
    TEAR: _tear,
    DIGEST: _answering(_digest),
    STATUS: _status,
    MANIFEST: _answering(_manifest),
    MEMBER: _member,
    STANDING: _standing,
    FORGET: _forget,
    LEND: lend_here,
    TAKE_BACK: take_back_here,
}

POINTS = tuple(
    PatchPoint(f"vllm.v1.worker.gpu_worker:Worker.{name}", expects=None, wrapper=method)
    for name, method in _METHODS.items()
)
