"""One layer whose codes are made of whole parameters: one scale a tensor, or stacked experts.

It waits in stages, as it arrives, in the trainer's precision. When it is complete, its codes are
made right where the kernels read them: no twin of the layer, and no second set of codes.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import NamedTuple

from torch import Tensor

from flashquant.patches.layers.base import LiveLayer
from flashquant.patches.layers.blueprint import LayerBlueprint
from flashquant.patches.layers.kernel_state import Carry
from flashquant.schemes import Quantize
from flashquant.update import UndoLog


class _Arrived(NamedTuple):
    """What has arrived of one parameter, and the live memory of it and of its scale, if any."""

    values: Tensor
    home: Tensor
    scale: Tensor | None


class PerTensorLayer(LiveLayer):
    """A module of which some parameters are quantized whole, and the others are live as they come.

    It has no `homes`: what arrives is in another dtype than what is live.

    Args:
        blueprint: the module.
        live: its memory, laid out as rows arrive, by parameter; the scale of codes that are
            made of a parameter `t` is `t_scale`.
        quantize: makes codes `[N, K]` and their scale `[1]`, or whatever scales are live; of
            experts, `[E, N, K]` at once.

    """

    def __init__(
        self, blueprint: LayerBlueprint, live: Mapping[str, Tensor], quantize: Quantize
    ) -> None:
        super().__init__((blueprint,), blueprint.forms, next(iter(live.values())).device, live)
        self._quantize = quantize

    def _made_beside(self) -> Carry:
        carry = Carry()
        for values, home, scale in self._arrived():
            if scale is None:
                carry.copy(home, values)
            else:
                codes, made = self._quantize(values, None)
                carry.copy(home, codes)
                carry.copy(scale, made)
        return carry

    def _make_live(self, undo: UndoLog) -> int:
        return sum(_quantize_home(arrived, self._quantize, undo) for arrived in self._arrived())

    def _arrived(self) -> Iterator[_Arrived]:
        for target, stage in self._stages.items():
            if stage.started:
                scale = self._live.get(f"{target}_scale")
                yield _Arrived(stage.memory(self.device), self._live[target], scale)


def _quantize_home(arrived: _Arrived, quantize: Quantize, undo: UndoLog) -> int:
    """Store one parameter in live memory; its bytes."""
    values, home, scale = arrived
    undo.remember(home)
    if scale is None:
        home.copy_(values)
        return home.nbytes
    undo.remember(scale)
    scale.copy_(quantize(values, home)[1])
    return home.nbytes + scale.nbytes
