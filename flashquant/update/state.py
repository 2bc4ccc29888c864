"""One transaction under way: what it has touched, and what its report will say."""

from __future__ import annotations

import time
from collections import defaultdict
from dataclasses import dataclass, field

from flashquant.plan import View
from flashquant.schemes import Doubts
from flashquant.update.code_statistics import Noted
from flashquant.update.engine import KVScales, Layer, Reach
from flashquant.update.integrity import Footprint
from flashquant.update.report import Drift
from flashquant.update.staging import Stage
from flashquant.update.undo import UndoLog


@dataclass
class Statistics:
    """What a report says of an update; nothing is decided by it.

    Attributes:
        tensors, bytes_in: read of the trainer's.
        bytes_out: written into live storage.
        seconds: by phase.
        ignored: names that the engine's loader drops.
        kept: parameters of which a part stayed as it was.
        noted: of codes, by name.
        drift: the same, once the update is committed.

    """

    tensors: int = 0
    bytes_in: int = 0
    bytes_out: int = 0
    seconds: dict[str, float] = field(default_factory=dict)
    ignored: list[str] = field(default_factory=list)
    kept: tuple[str, ...] = ()
    noted: dict[str, Noted] = field(default_factory=dict)
    drift: dict[str, Drift] = field(default_factory=dict)

    def read(self, nbytes: int) -> None:
        """Count one tensor of the trainer's."""
        self.tensors += 1
        self.bytes_in += nbytes

    def since(self, start: float, phase: str) -> float:
        """Add the time since `start` to a phase, and return what time it is now."""
        now = time.perf_counter()
        self.seconds[phase] = self.seconds.get(phase, 0.0) + now - start
        return now


@dataclass
class Update:
    """One transaction: a single push, or everything between `begin` and `finish`.

    Attributes:
        round: of the workers' ballot; None where there is only one worker, and for
            a push outside a bracket.
        prepares: nothing live is touched before it is finished, so the engine may generate.
        busy: something is being done for it right now, or was cut off.
        at_stake: the parameters that are lost if it fails and keeps no undo log.
        over: it is committed, or it has been rolled back.
        heard: when its trainer was last heard of, by `time.monotonic`.

    """

    undo: UndoLog
    bracket: bool = False
    prepares: bool = False
    start: float = field(default_factory=time.perf_counter)
    heard: float = field(default_factory=time.monotonic)
    round: int | None = None
    busy: bool = False
    over: bool = False
    at_stake: frozenset[str] = frozenset()
    before: dict[str, Footprint] = field(default_factory=dict)  # where the live tensors were
    audited: tuple[Layer, ...] | None = None  # which of them, by layer; None for all
    names: set[str] = field(default_factory=set)  # seen, scales made here included
    staged: dict[Stage, set[View]] = field(default_factory=lambda: defaultdict(set))
    arrived: set[str] = field(default_factory=set)  # parameters
    live: set[str] = field(default_factory=set)  # parameters, arrived now or earlier
    committed: set[str] = field(default_factory=set)  # layers
    touched: set[str] = field(default_factory=set)  # layers, of a push outside a bracket
    wanted: frozenset[str] | None = None  # parameters it has to bring; None for all
    waiting: dict[str, Layer] = field(default_factory=dict)  # layers, of which something came
    doubts: Doubts = field(default_factory=Doubts)
    prepared: dict[str, Layer] = field(default_factory=dict)  # layers
    offered: set[str] = field(default_factory=set)  # of a push by itself: all of its names
    dropped: dict[str, tuple[str, ...]] = field(default_factory=dict)  # layer -> what it lacked
    statistics: Statistics = field(default_factory=Statistics)
    kv_scales: KVScales = field(default_factory=dict)  # that go live when it is finished

    @property
    def reach(self) -> Reach:
        """How far it may reach into live memory before a layer is complete."""
        if self.prepares:
            return Reach.NOTHING
        return Reach.PARTS if self.bracket else Reach.WHOLE

    def claim(self, stage: Stage, view: View) -> None:
        """A window of a stage is about to be filled: it can be taken back from now on."""
        mine = self.staged[stage]
        if view not in mine:
            if stage.holds(view):
                stage.remember({view}, self.undo, values=True)
            mine.add(view)
