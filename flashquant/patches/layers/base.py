"""What every live layer is: parameters that wait in stages until all of them can go live.

One template, of which each kind of layer fills in the last two columns:

                     a stage holds              commit
    InPlaceLayer     what the kernels read      copies what does not lie in live memory already
    PerTensorLayer   what the trainer sent      quantizes each parameter into live memory
    ProcessedLayer   what the trainer sent      carries over what vLLM makes of it on a twin

The first two are written without vLLM's processing: `flashquant.Status` lists them as `direct`,
and says there what `direct`, `staged` and `fallback` mean.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Iterable, Iterator, Mapping
from types import MappingProxyType

import torch
from torch import Tensor

from flashquant.patches.layers import kernel_state
from flashquant.patches.layers.blueprint import LayerBlueprint
from flashquant.patches.layers.kernel_state import Carry
from flashquant.patches.layers.readiness import half_arrived
from flashquant.plan import Fill, Write
from flashquant.update import Reach, Stage, UndoLog, write


class LiveLayer(ABC):
    """One layer of a serving model; implements `flashquant.update.Layer`.

    Args:
        blueprints: the modules of the layer; the first one names it.
        forms: shape, strides and dtype of what waits, by parameter.
        device: where it waits.
        live: live memory, laid out as rows arrive, by parameter; none for a layer whose
            parameters processing has changed.

    """

    placement = "direct"
    homes: Mapping[str, Tensor] = MappingProxyType({})

    def __init__(
        self,
        blueprints: tuple[LayerBlueprint, ...],
        forms: Mapping[str, Tensor],
        device: torch.device,
        live: Mapping[str, Tensor] = MappingProxyType({}),
    ) -> None:
        self.name = blueprints[0].name
        self.blueprints = blueprints
        self.device = device
        self._stages = {
            target: Stage(form.shape, form.stride(), form.dtype) for target, form in forms.items()
        }
        self._live = dict(live)
        self._prepared: Carry | None = None

    @property
    def targets(self) -> tuple[str, ...]:
        return tuple(self._stages)

    @property
    def missing(self) -> tuple[str, ...]:
        """What must still arrive of parameters that have begun to."""
        return half_arrived(self._stages)

    @property
    def ready(self) -> bool:
        """Whether something is staged, and nothing more is needed."""
        return any(stage.started for stage in self._stages.values()) and not self.missing

    @property
    def editable(self) -> Mapping[str, Tensor]:
        """Live memory that may be overwritten by whoever calls `refresh` then."""
        return self.homes

    def refresh(self, targets: Iterable[str], undo: UndoLog) -> int:
        """Make anew what is made of parameters that were overwritten: here, nothing is."""
        return 0

    def stage(self, target: str) -> Stage:
        return self._stages[target]

    def held(self, target: str) -> Tensor | str:
        """What has arrived of a parameter; else it, as it is live."""
        stage = self._stages[target]
        return stage.memory(self.device) if stage.started else self._held_live(target)

    def _held_live(self, target: str) -> Tensor | str:
        """What is live of a parameter, or prepared, in checkpoint format; or its fingerprint."""
        live = self._live[target]
        return live if self._prepared is None else self._prepared.to_be(live)

    def move_in(self, target: str, undo: UndoLog) -> bool:
        """False: what arrives in part waits, unless the layer is written row by row."""
        return False

    def window(self, step: Write | Fill, undo: UndoLog, reach: Reach) -> Tensor:
        """The memory that one step fills."""
        self._adopt_live(step, undo, reach)
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
        self._adopt_live(step, undo, reach)
        write(step, incoming, self._stages[step.target], self.device, maxima)

    def _adopt_live(self, step: Write | Fill, undo: UndoLog, reach: Reach) -> None:
        """Before a step: let its stage lie in live memory, where it may."""
        return  # what arrives waits beside it

    def prepare(self, undo: UndoLog) -> None:
        """Make what is staged beside the live layer, which stays as it is until `commit`.

        What cannot be made beside it waits in its stages, and is made by `commit`.
        """
        fresh = self._made_beside()
        if fresh is None:
            return
        fresh.remember(undo, soon=False)
        self._prepared = fresh
        for stage in self._stages.values():
            stage.clear()

    def commit(self, undo: UndoLog) -> int:
        """Make what is staged, or was prepared, live, in place; free the stages.

        Returns:
            Bytes written into live tensors.

        """
        if self._prepared is None:
            written = self._make_live(undo)
        else:
            written = self._swap_in(self._prepared, undo)
        self.drop()
        return written

    @abstractmethod
    def _made_beside(self) -> Carry | None:
        """What `commit` would write of what is staged; None where it must be made in place."""

    @abstractmethod
    def _make_live(self, undo: UndoLog) -> int:
        """Write what is staged into live memory; the bytes written."""

    def _swap_in(self, prepared: Carry, undo: UndoLog) -> int:
        """Write what was prepared into live memory; the bytes written."""
        written = prepared.apply()
        undo.hold(prepared)
        return written

    def drop(self) -> None:
        """Forget whatever has arrived or was prepared; the live layer stays as it is."""
        self._prepared = None
        for stage in self._stages.values():
            stage.clear()

    def keep_rest(self) -> None:
        """Complete what has arrived in part with what is live, where rows are live as sent."""
        return  # here they are not

    def tensors(self) -> Iterator[tuple[str, Tensor]]:
        """Every live tensor of the layer, by full name."""
        for blueprint in self.blueprints:
            for path, tensor in kernel_state.tensors(blueprint.module):
                yield f"{blueprint.name}.{path}", tensor

    def contents(self) -> Iterator[tuple[str, Tensor | str]]:
        """What the kernels read, by full name."""
        yield from self.tensors()
