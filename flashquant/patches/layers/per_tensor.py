"""One layer whose codes are made when all of it is there: they share one scale, or are of experts.

It waits in a stage, as it arrives, in the trainer's precision. Then its codes are made right where
the kernels read them, in one go: no twin of the layer, and no second set of codes.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping

from torch import Tensor

from flashquant.patches.layers.base import StagedLayer
from flashquant.patches.layers.blueprint import LayerBlueprint
from flashquant.patches.layers.kernel_state import Carry
from flashquant.schemes import Quantize
from flashquant.update import UndoLog


class LateLayer(StagedLayer):
    """A module of which some parameters are quantized as a whole, and the others lie as they come.

    Args:
        blueprint: the module.
        live: its memory, laid out as rows arrive, by target; the scale of codes that are
            made of a target `t` is `t_scale`.
        quantize: makes codes `[N, K]` and their scale `[1]`, or whatever scales are live; of
            experts, `[E, N, K]` at once.

    """

    road = "direct"

    def __init__(
        self, blueprint: LayerBlueprint, live: Mapping[str, Tensor], quantize: Quantize
    ) -> None:
        forms = {
            target: form
            for name, target in blueprint.targets.items()
            if (form := blueprint.parameters[name]) is not None
        }
        super().__init__((blueprint,), forms, next(iter(live.values())).device)
        self._live, self._quantize = dict(live), quantize
        self._prepared: Carry | None = None

    def _held_live(self, target: str) -> Tensor:
        home = self._live[target]
        return home if self._prepared is None else self._prepared.to_be(home)

    def drop(self) -> None:
        self._prepared = None
        super().drop()

    def prepare(self, undo: UndoLog) -> None:
        carry = Carry()
        for home, values, scale in self._arrived():
            if scale is None:
                carry.copy(home, values)
                continue
            codes, made = self._quantize(values, None)
            carry.copy(home, codes)
            carry.copy(scale, made)
        carry.remember(undo, soon=False)
        self.drop()
        self._prepared = carry

    def commit(self, undo: UndoLog) -> int:
        if self._prepared is not None:
            written = self._prepared.apply()
            undo.hold(self._prepared)
        else:
            written = sum(self._make(*parameter, undo) for parameter in self._arrived())
        self.drop()
        return written

    def _make(self, home: Tensor, values: Tensor, scale: Tensor | None, undo: UndoLog) -> int:
        """Let one parameter go live; its bytes."""
        undo.remember(home)
        if scale is None:
            home.copy_(values)
            return home.nbytes
        undo.remember(scale)
        scale.copy_(self._quantize(values, home)[1])
        return home.nbytes + scale.nbytes

    def _arrived(self) -> Iterator[tuple[Tensor, Tensor, Tensor | None]]:
        """Where each parameter goes, what has arrived of it, and where its scale goes, if any."""
        for target, stage in self._stages.items():
            if stage.started:
                scale = self._live.get(f"{target}_scale")
                yield self._live[target], stage.memory(self.device), scale
