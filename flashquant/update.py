"""One transaction under way: what it has touched, and what it has cost so far."""

from __future__ import annotations

import time
from collections import defaultdict
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field

from flashquant.drift import Noted
from flashquant.plan import View
from flashquant.report import Drift
from flashquant.undo import UndoLog
from flashquant.verify import Footprint
from flashquant.write import Stage


@dataclass
class Update:
    """One transaction: a single push, or everything between `begin` and `finish`.

    Attributes:
        round: of the workers' ballot; None where there is only one worker, and for
            a push outside a bracket.
        busy: something is being done for it right now, or was cut off.
        at_stake: the parameters that are lost if it fails and keeps no undo log.
        over: it stands, or it has been rolled back.

    """

    undo: UndoLog
    bracket: bool = False
    round: int | None = None
    busy: bool = False
    over: bool = False
    at_stake: frozenset[str] = frozenset()
    before: dict[str, Footprint] = field(default_factory=dict)  # where the live tensors were
    names: set[str] = field(default_factory=set)  # seen, scales made here included
    staged: dict[Stage, set[View]] = field(default_factory=lambda: defaultdict(set))
    arrived: set[str] = field(default_factory=set)  # parameters
    live: set[str] = field(default_factory=set)  # parameters, arrived now or earlier
    committed: set[str] = field(default_factory=set)  # layers
    ignored: list[str] = field(default_factory=list)  # names the engine's loader drops
    tensors: int = 0
    bytes_in: int = 0
    bytes_out: int = 0
    seconds: dict[str, float] = field(default_factory=dict)  # by phase
    noted: dict[str, Noted] = field(default_factory=dict)  # of codes, by name
    drift: dict[str, Drift] = field(default_factory=dict)  # the same, once it stands

    @contextmanager
    def phase(self, name: str) -> Iterator[None]:
        """Add what happens inside to the time of a phase."""
        start = time.perf_counter()
        yield
        self.seconds[name] = self.seconds.get(name, 0.0) + time.perf_counter() - start
