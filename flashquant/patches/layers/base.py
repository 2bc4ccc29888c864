"""What every live layer is: parameters that wait in stages until all of them can go live."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from types import MappingProxyType

import torch
from torch import Tensor

from flashquant.patches.layers import kernel_state
from flashquant.patches.layers.blueprint import LayerBlueprint
from flashquant.plan import Fill, Write
from flashquant.update import Reach, Stage, UndoLog, write


def belong_together(one: str, other: str) -> bool:
    """Whether one parameter says how the other is to be read, as scales and zero points do.

    vLLM names them after it: `weight`, `weight_scale`, `weight_scale_inv`, `weight_zero_point`.
    Whatever a kernel makes of them, one without the other is another weight.
    """
    return one.startswith(f"{other}_") or other.startswith(f"{one}_")


class StagedLayer:
    """The half of `engine.Layer` that is the same whatever a layer makes of what arrives.

    Args:
        blueprints: the modules of the layer; the first one names it.
        forms: shape, strides and dtype of what waits, by parameter.
        device: where it waits.

    """

    homes: Mapping[str, Tensor] = MappingProxyType({})

    def __init__(
        self,
        blueprints: tuple[LayerBlueprint, ...],
        forms: Mapping[str, Tensor],
        device: torch.device,
    ) -> None:
        self.name = blueprints[0].name
        self.blueprints = blueprints
        self.device = device
        self._stages = {
            target: Stage(form.shape, form.stride(), form.dtype) for target, form in forms.items()
        }

    @property
    def targets(self) -> tuple[str, ...]:
        return tuple(self._stages)

    @property
    def missing(self) -> tuple[str, ...]:
        """What must still arrive of parameters that have begun to."""
        return tuple(t for t, stage in self._stages.items() if stage.started and not stage.complete)

    @property
    def ready(self) -> bool:
        """Whether something is staged, and nothing more is needed."""
        return any(stage.started for stage in self._stages.values()) and not self.missing

    def stage(self, target: str) -> Stage:
        return self._stages[target]

    def held(self, target: str) -> Tensor | str:
        """What has arrived of a parameter; else it, as it is live."""
        stage = self._stages[target]
        return stage.memory(self.device) if stage.started else self._held_live(target)

    def _held_live(self, target: str) -> Tensor | str:
        """What is live of a parameter, or prepared, in checkpoint format; or its fingerprint."""
        return self.homes[target]

    def move_in(self, target: str, undo: UndoLog) -> bool:
        """Never, unless a layer knows better: what arrives in part waits."""
        return False

    def window(self, step: Write | Fill, undo: UndoLog, reach: Reach) -> Tensor:
        """The memory that one step fills."""
        self._settle_in(step, undo, reach)
        return step.target_view.into(self._stages[step.target].memory(self.device))

    def receive(
        self,
        step: Write | Fill,
        incoming: Tensor,
        undo: UndoLog,
        reach: Reach,
        maxima: Tensor | None,
    ) -> None:
        """Take one window of one tensor."""
        self._settle_in(step, undo, reach)
        write(step, incoming, self._stages[step.target], self.device, maxima)

    def _settle_in(self, step: Write | Fill, undo: UndoLog, reach: Reach) -> None:
        """Before a step: see to it that its stage lies in live memory, where it may."""

    def drop(self) -> None:
        """Forget whatever has arrived; the live layer stays as it is."""
        for stage in self._stages.values():
            stage.clear()

    def keep_rest(self) -> None:
        """Nothing, unless a layer knows better: what is live need not be what was sent."""

    def tensors(self) -> Iterator[tuple[str, Tensor]]:
        """Every live tensor of the layer, by full name."""
        for blueprint in self.blueprints:
            for path, tensor in kernel_state.tensors(blueprint.module):
                yield f"{blueprint.name}.{path}", tensor

    def contents(self) -> Iterator[tuple[str, Tensor | str]]:
        """What the kernels read, by full name."""
        yield from self.tensors()
