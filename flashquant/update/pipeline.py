"""One tensor in an update: admitted, quantized, written, its layer committed.

    for each tensor:  plan it (once) -> quantize it -> write it -> commit its layer

What an update is, and whether it is committed, is the session's business.
"""

from __future__ import annotations

import time
from collections.abc import Iterable, Iterator, Sequence
from collections.abc import Set as AbstractSet
from itertools import chain

from torch import Tensor

from flashquant.errors import MisfitTensor, ReloadError
from flashquant.plan import NamedTensors, Replay, View, Write, replay
from flashquant.profiles import Calibration
from flashquant.schemes import check_finite, row_absmax
from flashquant.update.bindings import Binding, Bindings, Destination
from flashquant.update.code_statistics import CodeStatistics
from flashquant.update.engine import Engine, Layer, Reach
from flashquant.update.proofs import Proofs
from flashquant.update.quantize import as_stored, is_float
from flashquant.update.staging import Stage
from flashquant.update.state import Update
from flashquant.update.ties import Ties


class Pipeline:
    """Takes tensors into the layers of one live engine, on behalf of an update.

    Args:
        engine: the model.
        bindings: of every name.
        ties: the parameters that have several names.
        code_statistics: learns how codes move.
        calibration: the profile by which pushes are quantized; None where each row is by itself.
        proofs: watch what it writes.

    """

    def __init__(
        self,
        engine: Engine,
        bindings: Bindings,
        ties: Ties,
        code_statistics: CodeStatistics,
        calibration: Calibration | None,
        proofs: Proofs,
    ) -> None:
        self._engine, self._bindings, self._ties = engine, bindings, ties
        self._code_statistics = code_statistics
        self._calibration, self._proofs = calibration, proofs

    def take(self, weights: NamedTensors, update: Update) -> set[str]:
        """Plan, quantize, write and commit, one tensor at a time."""
        written: set[str] = set()
        if self._calibration is not None:
            self._calibration.remember(update.undo)
        in_place, bindings = update.reach is Reach.PARTS, self._bindings.known
        for name, sent in weights:
            if update.over:
                raise ReloadError(f"the update was rolled back before {name} arrived; send it anew")
            start = time.perf_counter()
            binding = bindings.get(name) if in_place else None
            write = None if binding is None else binding.in_place
            if write is not None and write.take(sent, update):
                start = update.statistics.since(start, write.phase)
                written.update(write.targets)
                if write.completes:
                    self._commit((write.layer,), update)
                    update.statistics.since(start, "commit")
            else:
                written.update(self._take_any(name, sent, update, start))
        return written

    def _take_any(self, name: str, sent: object, update: Update, start: float) -> Iterator[str]:
        """General path: works without anything that an earlier tensor of this name has shown."""
        binding, tensor = self._admit(name, sent, update)
        since = update.statistics.since
        start = since(start, "plan")
        if not binding.plan.steps:
            self._leave_out(binding, tensor, update)
            return iter(())
        made = self._codes_in_place(binding, tensor, update)
        stored = self._quantize(binding, tensor, made, update)
        start = since(start, "quantize")
        destinations = [self._bindings.destination(binding, *each) for each in stored]
        for (_, values), destination in zip(stored, destinations, strict=True):
            if made is not None and destination.plan.name == name:
                self._note_made(destination, values, update)
            else:
                self._write(destination, values, update)
        start = since(start, "write")
        if not self._ties.hold(binding.plan.targets):
            binding.learn(tensor)
        for destination in destinations:
            self._commit(destination.layers, update)
        since(start, "commit")
        return chain.from_iterable(destination.plan.targets for destination in destinations)

    def _admit(self, name: str, sent: object, update: Update) -> tuple[Binding, Tensor]:
        """Refuse a tensor before anything is touched, or say where it goes."""
        if name in update.names:
            raise MisfitTensor(f"{name} arrived twice in one update; send each tensor once")
        binding = self._bindings.of(name, sent)
        tensor = binding.check(sent)
        update.statistics.read(tensor.nbytes)
        update.names.add(name)
        return binding, tensor

    def _leave_out(self, binding: Binding, tensor: Tensor, update: Update) -> None:
        """The engine stores nothing of it; but what it is tied to must hold the same."""
        if binding.tie is None:
            update.statistics.ignored.append(binding.name)
            return
        check_finite(binding.name, tensor)
        self._ties.take(binding.tie, tensor.contiguous(), update.undo)

    def _codes_in_place(self, binding: Binding, tensor: Tensor, update: Update) -> Tensor | None:
        """The memory `[N, K]` in which the codes of this tensor belong, if they can be made there.

        It is claimed: what it holds can be put back from now on.
        """
        destination = binding.destination_of_codes(tensor)
        if destination is None:
            return None
        ((step, layer, stage),) = destination.steps
        if not isinstance(step, Write):
            return None
        self._claim(layer, stage, step.target_view, update)
        return layer.window(step, update.undo, update.reach)

    def _quantize(
        self, binding: Binding, tensor: Tensor, into: Tensor | None, update: Update
    ) -> Sequence[tuple[str, Tensor]]:
        """What is stored of a tensor; its codes in `into`, where that is given."""
        stored = tuple(as_stored(binding.recipe, tensor, into, update.doubts))
        clipping = {} if self._calibration is None else self._calibration.clipping
        for name, values in stored:
            # Not a norm that these codes silence: it may still come itself.
            if name in (binding.name, binding.recipe.scale_name):
                update.names.add(name)
            noted = self._code_statistics.note(name, values, clipping.pop(name, None))
            if noted is not None:
                update.statistics.noted[name] = noted
        return stored

    def _note_made(self, destination: Destination, codes: Tensor, update: Update) -> None:
        """Codes were made where they belong: they have arrived."""
        maxima = self._maxima(destination, codes)
        for step, layer, stage in destination.steps:
            stage.arrived(step.target_view, maxima)
            self._note_arrived(step.target, layer, update)
        self._ties.arrive(destination.plan.targets, update.undo)

    def _write(self, destination: Destination, tensor: Tensor, update: Update) -> None:
        tensor = tensor if destination.rows else tensor.contiguous()
        maxima = self._maxima(destination, tensor)
        for step, layer, stage in destination.steps:
            self._claim(layer, stage, step.target_view, update)
            if not isinstance(step, Replay):
                layer.receive(step, tensor, update.undo, update.reach, maxima)
            self._note_arrived(step.target, layer, update)
        if destination.plan.needs_loader:
            self._run_loader(destination, tensor)
        self._ties.arrive(destination.plan.targets, update.undo)

    @staticmethod
    def _note_arrived(target: str, layer: Layer, update: Update) -> None:
        update.arrived.add(target)
        update.waiting[layer.name] = layer

    def _claim(self, layer: Layer, stage: Stage, view: View, update: Update) -> None:
        if not update.bracket and layer.name not in update.touched:  # `begin` looks at all of them
            self._proofs.look_at(layer.name)
            update.touched.add(layer.name)
        update.claim(stage, view)

    def _maxima(self, destination: Destination, tensor: Tensor) -> Tensor | None:
        """Those of the rows of the whole tensor, where other workers hold shards of its layer."""
        if not self._engine.shares_scales:
            return None
        target, *others = destination.plan.targets  # of a tensor that is cut up, each has its own
        held = self._engine.targets.get(target)  # None for the scales that codes bring along
        # Codes have their scales already, and those are of whole rows.
        if others or held is None or not (tensor.dim() in (2, 3) and is_float(tensor)):
            return None
        rows = tensor.mT if destination.plan.turns_rows else tensor
        # Of what the parameter will hold: rounding keeps the order of magnitudes.
        return row_absmax(rows).to(held.dtype).float()

    def _run_loader(self, destination: Destination, tensor: Tensor) -> None:
        """The loader does more than copy: run it for real, on staged memory."""
        stages = {step.target: stage for step, _, stage in destination.steps}
        memory = {target: stage.memory(self._engine.device) for target, stage in stages.items()}
        with self._engine.laid_out(memory):
            replay(self._engine.load, destination.plan, tensor, memory)
        for step, _, stage in destination.steps:
            check_finite(destination.plan.name, step.target_view.into(memory[step.target]))
            stage.arrived(step.target_view)

    def keep_rest(self, update: Update, lost: AbstractSet[str]) -> None:
        """Complete layers that have arrived in part with what is live of them, where that can be.

        Args:
            lost: parameters that do not hold what they should, so nothing of them can be kept.

        """
        for layer in update.waiting.values():
            if (missing := layer.missing) and lost.isdisjoint(layer.targets):
                layer.keep_rest()
                still = layer.missing
                update.statistics.kept += tuple(target for target in missing if target not in still)

    def finish(self, update: Update) -> None:
        """Nothing more will come: let those layers go live that are as ready as they will be."""
        start = time.perf_counter()
        for layer in list(update.waiting.values()):
            if layer.ready:
                self._let_live(layer, update)
        update.doubts.resolve()
        update.statistics.since(start, "commit")

    def _commit(self, layers: Iterable[Layer], update: Update) -> None:
        """Let those layers go live that this tensor completed.

        Inside a bracket, one that a complete update would bring more of waits for the end. Outside
        of one, the end of the push is waited for where shards of earlier pushes would go live
        with it: what else it brings may show that they belong to an earlier sync.
        """
        for layer in layers:
            sure = self._bindings.is_full(layer) if update.bracket else _is_new(layer, update)
            if sure and layer.ready:
                self._let_live(layer, update)

    def _let_live(self, layer: Layer, update: Update) -> None:
        stages = () if update.bracket else map(layer.stage, layer.targets)  # it began with none
        for stage in stages:
            if stage.count > len(update.staged[stage]):  # earlier pushes brought the rest
                earlier = stage.windows - update.staged[stage]
                stage.remember(earlier, update.undo, values=False)
        update.live.update(target for target in layer.targets if layer.stage(target).started)
        update.waiting.pop(layer.name, None)
        if update.prepares:
            layer.prepare(update.undo)
            update.prepared[layer.name] = layer
            return
        update.committed.add(layer.name)
        before = {} if update.bracket else self._proofs.footprints([layer])
        update.statistics.bytes_out += layer.commit(update.undo)
        if not update.bracket:
            self._proofs.check_unmoved(before, [layer])

    def swap_in(self, update: Update) -> None:
        """What was prepared goes live: from here on, the engine may not generate."""
        start = time.perf_counter()
        for name, layer in update.prepared.items():
            update.undo.touch()
            update.committed.add(name)
            update.statistics.bytes_out += layer.commit(update.undo)
        if update.prepares:
            update.statistics.since(start, "swap")


def _is_new(layer: Layer, update: Update) -> bool:
    """Whether all that is staged of a layer has come with this update."""
    stages = map(layer.stage, layer.targets)
    return all(stage.count <= len(update.staged.get(stage, ())) for stage in stages)
