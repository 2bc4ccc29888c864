"""The only rooms that name vLLM: seams, guards, and what its kernels made of the weights.

`patch()` puts every point in place, or none. Which points there are is one
table; each seam has a file of its own.
"""

from __future__ import annotations

import logging
from contextlib import ExitStack

import vllm

from flashquant.patches import guard, layers, remote, seams, transfer
from flashquant.patches.point import PatchPoint

logger = logging.getLogger(__name__)

_KNOWN: tuple[PatchPoint, ...] = (*seams.POINTS, *remote.POINTS, *layers.POINTS)
POINTS = tuple(point for point in _KNOWN if point.is_in(vllm.__version__))
# Seams of other versions: there is nothing to wrap, but that they are missing is looked at.
ELSEWHERE = tuple(point for point in _KNOWN if not point.is_in(vllm.__version__))

_applied: ExitStack | None = None


def patch() -> None:
    """Apply every point, or none of them. Calling it twice changes nothing.

    Raises:
        UnsupportedEngine: vLLM is outside the tested range.
        PatchError: a seam is missing, taken, or shaped differently.

    """
    global _applied
    if _applied is not None:
        return
    guard.check_version(vllm.__version__)
    layers.allow_amx()
    for point in POINTS:
        # All modules are imported before the first name is replaced: one that is imported
        # later would take a replaced name over by value, for good.
        point.check()
    for point in ELSEWHERE:
        point.check_absent()
    with ExitStack() as stack:
        for point in POINTS:
            stack.callback(point.apply())
        stack.callback(transfer.register())
        _applied = stack.pop_all()
    logger.info("patched %d points in vllm %s", len(POINTS), vllm.__version__)


def unpatch() -> None:
    """Take every point out again, newest first; without effect when nothing is patched.

    Engines that were created while patched keep their sessions.

    Raises:
        PatchError: someone wrapped a point after flashquant did; the others are out.

    """
    global _applied
    if _applied is None:
        return
    stack, _applied = _applied, None
    stack.close()


def is_patched() -> bool:
    """Whether the points are in place in this process."""
    return _applied is not None
