"""One update of one live model: all or nothing, in place, bit-identical to a fresh start.

deltas              bundles of what changed, onto the policy that they start from
session             the only room that knows the order
pipeline            one tensor: admitted, quantized, written, its layer committed
bindings            what is known of a name before its tensor comes
transaction, undo   an update is committed, or the old weights are put back
streams             all of it on one stream of a GPU
completeness        what has not arrived yet; passes, where one sync ends and the next begins
agreement           all workers commit, or none does
integrity           nothing moved
report, status      what an update did; how the model stands; ranks, of several workers
foreign, serving    other writers; whether the weights may be served
code_statistics     how far codes moved, and what frozen scales clipped
checkpoint          the live model as the tensors that a sender delivers, read back
engine              the protocols that patches/ answers with vLLM, and a test with ten lines
"""

from __future__ import annotations

from flashquant.schemes import digests
from flashquant.update.agreement import Ballot
from flashquant.update.deltas import Deltas
from flashquant.update.engine import CacheScales, Engine, KVScales, Layer, Reach, scheme_of
from flashquant.update.integrity import footprints
from flashquant.update.members import Member
from flashquant.update.report import Drift, ReloadReport
from flashquant.update.session import Session
from flashquant.update.staging import Stage, write
from flashquant.update.state import Update
from flashquant.update.status import Refusal, Status, WhyInBf16
from flashquant.update.undo import UndoLog
from flashquant.update.wording import some_of

__all__ = [
    "Ballot",
    "CacheScales",
    "Deltas",
    "Drift",
    "Engine",
    "KVScales",
    "Layer",
    "Member",
    "Reach",
    "Refusal",
    "ReloadReport",
    "Session",
    "Stage",
    "Status",
    "UndoLog",
    "Update",
    "WhyInBf16",
    "digests",
    "footprints",
    "scheme_of",
    "some_of",
    "write",
]
