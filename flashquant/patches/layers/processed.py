"""One layer whose live memory is made by vLLM's own processing, or that is simply copied.

What vLLM packs, transposes or quantizes waits in checkpoint format. When it is complete, the same
processing runs on a twin of this one layer (`twins`), and the results are carried over in place.
Parameters that processing passes through (`pass_through`), and all those of a layer that vLLM
does not process, are copied.

Modules that share a parameter (a tied head and the embeddings) are one layer here: whatever any
of them derived from it (a packed copy) is made anew.
"""

from __future__ import annotations

import contextlib
from collections.abc import Collection, Iterable, Iterator, Mapping, Sequence

import torch
from torch import Tensor

from flashquant.patches.layers import cpu
from flashquant.patches.layers.aliases import Alias
from flashquant.patches.layers.base import LiveLayer
from flashquant.patches.layers.blueprint import Context, LayerBlueprint
from flashquant.patches.layers.kernel_state import Carry
from flashquant.patches.layers.live_parameters import LiveParameters
from flashquant.patches.layers.packed_digests import PackedDigests
from flashquant.patches.layers.readiness import lacking_to_process
from flashquant.patches.layers.twins import Twins
from flashquant.plan import Fill, Write
from flashquant.update import Reach, UndoLog


class ProcessedLayer(LiveLayer):
    """The modules that share parameters, and what vLLM makes of these.

    Args:
        blueprints: the modules of the layer; the first one names it.
        loaded: the fingerprints of their parameters, taken just before processing.
        alone: the parameters that go live by themselves, and the live tensors that are them.
        context: the surroundings in which vLLM processes layers.
        device: where staged tensors live.
        aliases: windows of its parameters that other layers hold as they were loaded.
        compared: parameters that are fingerprinted, to be compared with what comes under their
            other names.
        changed: parameters that processing makes something else of.

    """

    def __init__(
        self,
        blueprints: Sequence[LayerBlueprint],
        loaded: Mapping[str, str],
        alone: Mapping[str, tuple[Tensor, ...]],
        context: Context,
        device: torch.device,
        aliases: Sequence[Alias] = (),
        compared: Collection[str] = (),
        changed: Collection[str] = (),
    ) -> None:
        self._metas = {t: form for one in blueprints for t, form in one.forms.items()}
        super().__init__(tuple(blueprints), self._metas, device)
        is_processed = any(blueprint.method is not None for blueprint in blueprints)
        self.placement = "staged" if is_processed else "direct"
        self._aliases = [one for one in aliases if one.target in self._metas]
        self._alone = alone
        self._parameters = LiveParameters(blueprints, self._metas, loaded, changed)
        self._twins = Twins(blueprints, context)
        digests = {target: loaded.get(target, "") for target in self._metas}
        self._digests = PackedDigests(blueprints, digests, compared)

    def rehearse(self) -> None:
        """Process a twin of zeros, if the layer has an attention that vLLM processes.

        Raises:
            UnsupportedEngine: as `Twins.rehearse`.

        """
        if any(blueprint.sources for blueprint in self.blueprints):
            zeros = {t: torch.zeros_like(m, device=self.device) for t, m in self._metas.items()}
            self._twins.rehearse(zeros, self._stages)

    @property
    def missing(self) -> tuple[str, ...]:
        """The parameters that must still arrive before anything staged can go live."""
        return lacking_to_process(self._stages, self._alone, self._parameters.kept)

    def _adopt_live(self, step: Write | Fill, undo: UndoLog, reach: Reach) -> None:
        """A layer with a single parameter that arrives whole needs no stage: it is
        written where it lives, and the undo log keeps what was there.
        """
        stage = self._stages[step.target]
        whole = isinstance(step, Write) and step.target_view.numel == stage.numel
        alone = whole and len(self._stages) == 1 and reach is not Reach.NOTHING
        live = self._parameters.in_place(step.target) if alone else None
        if live is not None:
            undo.remember(live)
            stage.adopt(live)

    def _held_live(self, target: str) -> Tensor | str:
        prepared = None if self._prepared is None else self._digests.coming(target)
        if prepared is not None:
            return prepared
        live = self._parameters.read_back(target) if target in self._parameters.kept else None
        return self._digests.of(target) if live is None else live

    def drop(self) -> None:
        self._digests.drop()
        super().drop()

    def _made_beside(self) -> Carry | None:
        staged = self._staged()
        self._parameters.check_ties(staged)
        self._digests.look_at(staged)
        carry = self._copied(staged) if self._passes_through(staged) else self._packed(staged)
        if carry is not None:
            for tensor, target, view in self._aliases:
                if target in staged:
                    carry.copy(tensor, view.into(staged[target]))
        return carry

    def _copied(self, staged: Mapping[str, Tensor]) -> Carry:
        carry = Carry()
        for target, values in staged.items():
            for live in self._alone[target]:
                carry.copy(live, values)
        return carry

    def _packed(self, staged: Mapping[str, Tensor]) -> Carry | None:
        """What processing makes of staged values; None where a handler reads its scales at once."""
        scales = cpu.LiveScales()
        for target, values in staged.items():
            if (live := self._parameters.in_place(target)) is not None:
                scales[values.data_ptr()] = live
        rest = {t: self._parameters.value(t) for t in self._stages if t not in staged}
        making = self._twins.processed({**staged, **rest}, self._stages)
        with cpu.handlers_point_at(scales), contextlib.closing(making) as parts:
            carry = Carry.of(parts)
        return None if scales.refused else carry

    def _swap_in(self, prepared: Carry, undo: UndoLog) -> int:
        self._digests.note(undo)
        return super()._swap_in(prepared, undo)

    def _make_live(self, undo: UndoLog) -> int:
        staged = self._staged()
        self._parameters.check_ties(staged)
        self._digests.look_at(staged)
        self._digests.note(undo)
        self._refresh_aliases(staged, undo)
        if self._passes_through(staged):
            return sum(self._copy(target, values, undo) for target, values in staged.items())
        return self._process(staged, undo)

    @property
    def editable(self) -> Mapping[str, Tensor]:
        """The parameters that are live as they were loaded, if all of the layer can be read."""
        if self._prepared is not None or not self._metas.keys() <= self._parameters.kept:
            return {}
        found = ((target, self._parameters.in_place(target)) for target in self._metas)
        return {target: live for target, live in found if live is not None}

    def refresh(self, targets: Iterable[str], undo: UndoLog) -> int:
        changed = {target: self._parameters.value(target) for target in targets}
        self._digests.look_at(changed)
        self._digests.note(undo)
        self._refresh_aliases(changed, undo)
        if self._passes_through(changed):
            return sum(self._copy(target, values, undo) for target, values in changed.items())
        return self._process({}, undo)

    def _staged(self) -> dict[str, Tensor]:
        """What has arrived, by parameter, in checkpoint format."""
        return {t: s.memory(self.device) for t, s in self._stages.items() if s.started}

    def _passes_through(self, staged: Mapping[str, Tensor]) -> bool:
        return staged.keys() <= self._alone.keys()

    def _copy(self, target: str, values: Tensor, undo: UndoLog) -> int:
        """Copy a parameter over the live tensors that are it; their bytes."""
        for live in self._alone[target]:
            if live.data_ptr() != values.data_ptr():
                undo.remember(live)
                live.detach().copy_(values)
        return sum(live.nbytes for live in self._alone[target])

    def _process(self, staged: Mapping[str, Tensor], undo: UndoLog) -> int:
        """Run vLLM's processing on a twin of each module, and carry the results over."""
        values, written = {}, 0
        for target in self._stages:
            values[target], moved = self._to_process(target, staged.get(target), undo)
            written += moved
        with contextlib.closing(self._twins.processed(values, self._stages)) as parts:
            for carry in parts:
                carry.remember(undo)
                written += carry.apply()
                del carry  # and with it what it replaced, before the next one is made
        return written

    def _to_process(self, target: str, staged: Tensor | None, undo: UndoLog) -> tuple[Tensor, int]:
        """The checkpoint-format tensor to process, and the bytes it took to put it there.

        Where the live parameter still is the checkpoint's, it takes the staged
        values first and is processed as it lies: a handler that keeps a raw
        pointer to its scales then points at the live scales, for good.
        """
        if staged is None:
            return self._parameters.value(target), 0
        live = self._parameters.in_place(target)
        if live is None:
            return staged, 0
        if staged.data_ptr() != live.data_ptr():
            undo.remember(live)
            live.copy_(staged)
        return live, live.nbytes

    def _refresh_aliases(self, staged: Mapping[str, Tensor], undo: UndoLog) -> None:
        """Bring what other layers hold of a parameter up to date."""
        for tensor, target, view in self._aliases:
            if target in staged:
                undo.remember(tensor)
                tensor.copy_(view.into(staged[target]))

    def tensors(self) -> Iterator[tuple[str, Tensor]]:
        """Every live tensor that is made of the layer's parameters, by full name."""
        return self._twins.tensors()

    def contents(self) -> Iterator[tuple[str, Tensor | str]]:
        """What the kernels read, by full name: tensors, and fingerprints of packed memory."""
        for blueprint in self.blueprints:
            for path, leaf in self._twins.leaves(blueprint, blueprint.module).items():
                if isinstance(leaf, Tensor):
                    yield f"{blueprint.name}.{path}", leaf
            yield from self._digests.contents(blueprint)
