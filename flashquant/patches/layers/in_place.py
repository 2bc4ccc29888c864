"""One layer that is written where its kernels read it: row by row, without processing.

Inside a bracket, rows of codes are made right in live memory, and the undo log keeps what was
there. A push by itself may bring a part of a fused layer only, and the engine may generate before
the rest arrives; so it waits in a stage, as small as the live memory, until it is complete.
"""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor

from flashquant.patches.layers.base import LiveLayer
from flashquant.patches.layers.blueprint import LayerBlueprint
from flashquant.patches.layers.kernel_state import Carry
from flashquant.patches.layers.readiness import lacking_with_partners, partners
from flashquant.plan import Fill, Write
from flashquant.update import Reach, Stage, UndoLog


class InPlaceLayer(LiveLayer):
    """A module all of whose parameters are live as their rows arrive.

    Args:
        blueprint: the module.
        homes: its live memory, laid out as rows arrive, by parameter; codes and the scales that
            are made with them are two parameters.

    """

    def __init__(self, blueprint: LayerBlueprint, homes: Mapping[str, Tensor]) -> None:
        super().__init__((blueprint,), homes, next(iter(homes.values())).device, homes)
        self.homes = self._live
        self._partners = partners(self._stages)
        self._logs: dict[str, UndoLog] = {}  # which keeps what a home held that is being filled

    @property
    def missing(self) -> tuple[str, ...]:
        """What must still arrive of parameters that have begun to; codes wait for their scales."""
        return lacking_with_partners(self._stages, self._partners)

    def _adopt_live(self, step: Write | Fill, undo: UndoLog, reach: Reach) -> None:
        stage = self._stages[step.target]
        if reach is Reach.PARTS or (reach is Reach.WHOLE and self._is_whole(step, stage)):
            self.move_in(step.target, undo)

    def move_in(self, target: str, undo: UndoLog) -> bool:
        if self._logs.get(target) is undo:
            return True
        stage, home = self._stages[target], self.homes[target]
        if stage.started and not stage.lies_in(home):
            return False  # its loader began it, on staged memory: both must not have a part
        # All of it: it is to arrive as a whole, or is put back as a whole.
        undo.remember(home)
        stage.adopt(home)
        self._logs[target] = undo
        return True

    def _is_whole(self, step: Write | Fill, stage: Stage) -> bool:
        """Whether a step brings all of a parameter that has no partners."""
        return not self._partners[step.target] and step.target_view.numel == stage.numel

    def keep_rest(self) -> None:
        missing = self.missing
        if all(self._same_rows(target) for target in missing):
            for target in missing:
                self._stages[target].fill_up(self.homes[target], self.device)

    def _same_rows(self, target: str) -> bool:
        """Whether codes and scales have arrived of the same rows, and of whole ones."""
        partners = self._partners[target]
        if not partners:
            return True
        mask = self._stages[target].mask
        rows = mask.all(-1)
        return torch.equal(rows, mask.any(-1)) and all(
            torch.equal(partner.mask.all(-1), rows) for partner in partners
        )

    def drop(self) -> None:
        self._logs.clear()
        super().drop()

    def _made_beside(self) -> Carry:
        carry = Carry()
        for target, stage in self._stages.items():
            if stage.started:
                carry.copy(self.homes[target], stage.memory(self.device))
        return carry

    def _make_live(self, undo: UndoLog) -> int:
        return sum(self._copy_home(target, undo) for target in self._stages)

    def _copy_home(self, target: str, undo: UndoLog) -> int:
        """Copy what has arrived of a parameter to live memory, unless it lies there; its bytes."""
        stage, home = self._stages[target], self.homes[target]
        if not stage.started:
            return 0
        if not stage.lies_in(home):
            undo.remember(home)
            home.copy_(stage.memory(self.device))
        return home.nbytes
