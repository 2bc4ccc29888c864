"""One layer whose codes can be made only when all of it is there: they share one scale.

It waits in a stage, as it arrives, in the trainer's precision. Then its codes are made right where
the kernels read them, in one pass: no twin of the layer, and no second set of codes.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from types import MappingProxyType

import torch
from torch import Tensor

from flashquant.engine import Reach
from flashquant.patches import kernel_state
from flashquant.patches.blueprint import LayerBlueprint
from flashquant.patches.kernel_state import Carry
from flashquant.plan import Fill, Write
from flashquant.schemes.quick import Quantize
from flashquant.undo import UndoLog
from flashquant.write import Stage, write


class LateLayer:
    """A module of which some parameters are quantized as a whole, and the others lie as they come.

    Args:
        blueprint: the module.
        live: its memory, laid out as rows arrive, by target; the scale of codes that are
            made of a target `t` is `t_scale`.
        quantize: makes codes `[N, K]` and their scale `[1]`.

    """

    road = "direct"
    homes: Mapping[str, Tensor] = MappingProxyType({})  # nothing may be there before all of it is

    def __init__(
        self, blueprint: LayerBlueprint, live: Mapping[str, Tensor], quantize: Quantize
    ) -> None:
        self.name = blueprint.name
        self.device: torch.device = next(iter(live.values())).device
        self.blueprints = (blueprint,)
        self._live, self._quantize = dict(live), quantize
        self._stages = {
            target: Stage(meta.shape, meta.stride(), meta.dtype)
            for name, target in blueprint.targets.items()
            if (meta := blueprint.parameters[name]) is not None
        }
        self._prepared: Carry | None = None

    @property
    def targets(self) -> tuple[str, ...]:
        return tuple(self._stages)

    @property
    def missing(self) -> tuple[str, ...]:
        """What must still arrive of parameters that have begun to."""
        return tuple(t for t, stage in self._stages.items() if stage.started and not stage.complete)

    @property
    def ready(self) -> bool:
        return any(stage.started for stage in self._stages.values()) and not self.missing

    def stage(self, target: str) -> Stage:
        return self._stages[target]

    def window(self, step: Write | Fill, undo: UndoLog, reach: Reach) -> Tensor:
        return step.target_view.into(self._stages[step.target].memory(self.device))

    def move_in(self, target: str, undo: UndoLog) -> bool:
        return False

    def receive(
        self,
        step: Write | Fill,
        incoming: Tensor,
        undo: UndoLog,
        reach: Reach,
        maxima: Tensor | None,
    ) -> None:
        write(step, incoming, self._stages[step.target], self.device, maxima)

    def drop(self) -> None:
        self._prepared = None
        for stage in self._stages.values():
            stage.clear()

    def prepare(self, undo: UndoLog) -> None:
        carry = Carry()
        for home, values, scale in self._arrived():
            codes, made = (values, None) if scale is None else self._quantize(values, None)
            carry.copy(home, codes)
            if scale is not None and made is not None:
                carry.copy(scale, made)
        carry.remember(undo, soon=False)
        self._prepared = carry
        for stage in self._stages.values():
            stage.clear()

    def commit(self, undo: UndoLog) -> int:
        if self._prepared is not None:
            written = self._prepared.apply()
            undo.hold(self._prepared)
            self.drop()
            return written
        written = 0
        for home, values, scale in self._arrived():
            undo.remember(home)
            written += home.nbytes
            if scale is None:
                home.copy_(values)
                continue
            undo.remember(scale)
            scale.copy_(self._quantize(values, home)[1])
            written += scale.nbytes
        self.drop()
        return written

    def tensors(self) -> Iterator[tuple[str, Tensor]]:
        """Every live tensor of the layer, by full name."""
        for blueprint in self.blueprints:
            for path, tensor in kernel_state.tensors(blueprint.module):
                yield f"{blueprint.name}.{path}", tensor

    contents = tensors

    def _arrived(self) -> Iterator[tuple[Tensor, Tensor, Tensor | None]]:
        """Where each parameter goes, what has arrived of it, and where its scale goes, if any."""
        for target, stage in self._stages.items():
            if stage.started:
                scale = self._live.get(f"{target}_scale")
                yield self._live[target], stage.memory(self.device), scale
