"""The way of one tensor through an update: admitted, quantized, written, its layer committed.

    for each tensor:  plan it (once) -> quantize it -> write it -> commit its layer

What an update is, and whether it stands, is the session's business.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable, Iterator
from collections.abc import Set as AbstractSet
from itertools import chain

from torch import Tensor

from flashquant.config.checks import Checks
from flashquant.errors import MisfitTensor, ReloadError
from flashquant.plan import NamedTensors, Replay, View, Write
from flashquant.profiles import Calibration
from flashquant.schemes import check_finite, row_absmax
from flashquant.update.bindings import Landing, Way, Ways
from flashquant.update.code_statistics import Drifts
from flashquant.update.engine import Engine, Layer, Reach
from flashquant.update.fast_bindings import Shortcuts
from flashquant.update.integrity import Footprint, check_unmoved, footprints
from flashquant.update.quantize import as_stored, is_float
from flashquant.update.staging import Stage
from flashquant.update.state import Update
from flashquant.update.ties import Ties


class Road:
    """Takes tensors into the layers of one live engine, on behalf of an update.

    Args:
        engine: the model.
        ways: where every name lands.
        ties: the parameters that have several names.
        drifts: who is told how codes move.
        calibration: the profile by which pushes are quantized; None where each row is by itself.
        checks: which proofs every update carries.

    """

    def __init__(
        self,
        engine: Engine,
        ways: Ways,
        ties: Ties,
        drifts: Drifts,
        calibration: Calibration | None,
        checks: Checks,
    ) -> None:
        self._engine, self._ways, self._ties, self._drifts = engine, ways, ties, drifts
        self._calibration, self._checks = calibration, checks
        self._shortcuts = Shortcuts()
        self.about_to_write: Callable[[str], object] = lambda layer: None

    def take(self, weights: NamedTensors, update: Update) -> set[str]:
        """Plan, quantize, write and commit, one tensor at a time."""
        written: set[str] = set()
        if self._calibration is not None:
            self._calibration.remember(update.undo)
        in_place = update.reach is Reach.PARTS
        for name, sent in weights:
            if update.over:
                raise ReloadError(f"the update was rolled back before {name} arrived; send it anew")
            start = time.perf_counter()
            short = self._shortcuts.of(name) if in_place else None
            if short is not None and short.take(sent, update):
                start = update.since(start, short.phase)
                written.update(short.targets)
                if short.completes:
                    self._commit((short.layer,), update)
                    update.since(start, "commit")
            else:
                written.update(self._take_long(name, sent, update, start))
        return written

    def _take_long(self, name: str, sent: object, update: Update, start: float) -> Iterator[str]:
        """Take one tensor of which nothing needs to be known."""
        way, tensor = self._admit(name, sent, update)
        start = update.since(start, "plan")
        if not way.entry.steps:
            self._leave_out(way, tensor, update)
            return iter(())
        stored, made_there = self._quantize(way, tensor, update)
        start = update.since(start, "quantize")
        landings = [
            self._write(way, each, values, update, arrived=values is made_there)
            for each, values in stored
        ]
        start = update.since(start, "write")
        if not self._ties.hold(way.entry.targets):
            self._shortcuts.learn(way, tensor)
        for landing in landings:
            self._commit(landing.layers, update)
        update.since(start, "commit")
        return chain.from_iterable(landing.entry.targets for landing in landings)

    def _admit(self, name: str, sent: object, update: Update) -> tuple[Way, Tensor]:
        """Refuse a tensor before anything is touched, or say where it goes."""
        if name in update.names:
            raise MisfitTensor(f"{name} arrived twice in one update; send each tensor once")
        way = self._ways.of(name, sent)
        tensor = way.check(sent)
        update.tensors += 1
        update.bytes_in += tensor.nbytes
        update.names.add(name)
        return way, tensor

    def _leave_out(self, way: Way, tensor: Tensor, update: Update) -> None:
        """The engine stores nothing of it; but what it is tied to must hold the same."""
        if way.tie is None:
            update.ignored.append(way.name)
            return
        check_finite(way.name, tensor)
        self._ties.take(way.tie, tensor.contiguous(), update.undo)

    def _quantize(
        self, way: Way, tensor: Tensor, update: Update
    ) -> tuple[Iterable[tuple[str, Tensor]], Tensor | None]:
        """What is stored of a tensor, and which of it was made right where it belongs."""
        landing = way.landing_of_codes(tensor)
        into = None
        if landing is not None:
            for step, layer, stage in landing.steps:
                if isinstance(step, Write):
                    self._claim(layer, stage, step.target_view, update)
                    into = layer.window(step, update.undo, update.reach)
        stored = as_stored(way.recipe, tensor, into, update.doubts)
        clipping = {} if self._calibration is None else self._calibration.clipping
        for name, values in stored:
            # Not a norm that these codes silence: it may still come itself.
            if name in (way.name, way.recipe.scale_name):
                update.names.add(name)
            noted = self._drifts.note(name, values, clipping.pop(name, None))
            if noted is not None:
                update.noted[name] = noted
        return stored, into

    def _write(
        self, way: Way, stored: str, tensor: Tensor, update: Update, *, arrived: bool
    ) -> Landing:
        landing = self._ways.landing(way, stored, tensor)
        tensor = tensor.contiguous() if not landing.rows else tensor
        maxima = self._maxima(landing, tensor)
        for step, layer, stage in landing.steps:
            self._claim(layer, stage, step.target_view, update)
            if arrived:
                stage.arrived(step.target_view, maxima)
            elif not isinstance(step, Replay):
                layer.receive(step, tensor, update.undo, update.reach, maxima)
            update.arrived.add(step.target)
            update.waiting[layer.name] = layer
        if landing.entry.needs_loader:
            self._replay(landing, tensor)
        self._ties.arrive(landing.entry.targets, update.undo)
        return landing

    def _claim(self, layer: Layer, stage: Stage, view: View, update: Update) -> None:
        if not update.bracket and layer.name not in update.touched:  # `begin` looks at all of them
            self.about_to_write(layer.name)
            update.touched.add(layer.name)
        update.claim(stage, view)

    def _maxima(self, landing: Landing, tensor: Tensor) -> Tensor | None:
        """Those of the rows of the whole tensor, where other workers hold shards of its layer."""
        if not self._engine.shares_scales:
            return None
        target, *others = landing.entry.targets  # of a tensor that is cut up, each has its own
        held = self._engine.targets.get(target)  # None for the scales that codes bring along
        # Codes have their scales already, and those are of whole rows.
        if others or held is None or not (tensor.dim() == 2 and is_float(tensor)):
            return None
        # Of what the parameter will hold: rounding keeps the order of magnitudes.
        return row_absmax(tensor).to(held.dtype).float()

    def _replay(self, landing: Landing, tensor: Tensor) -> None:
        """The loader does more than copy: run it for real, on staged memory."""
        stages = {step.target: stage for step, _, stage in landing.steps}
        memory = {target: stage.memory(self._engine.device) for target, stage in stages.items()}
        with self._engine.laid_out(memory):
            self._engine.load([(landing.entry.name, tensor)])
        for step, _, stage in landing.steps:
            check_finite(landing.entry.name, step.target_view.into(memory[step.target]))
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
                update.kept += tuple(target for target in missing if target not in still)

    def finish(self, update: Update) -> None:
        """Nothing more will come: let those layers go live that are as ready as they will be."""
        start = time.perf_counter()
        for layer in list(update.waiting.values()):
            if layer.ready:
                self._let_live(layer, update)
        update.doubts.resolve()
        update.since(start, "commit")

    def _commit(self, layers: Iterable[Layer], update: Update) -> None:
        """Let those layers go live that this tensor completed.

        Inside a bracket, one that a complete update would bring more of waits for the end. Outside
        of one, the end of the push is waited for where shards of earlier pushes would go live
        with it: what else it brings may show that they belong to an earlier sync.
        """
        for layer in layers:
            sure = self._ways.is_full(layer) if update.bracket else _is_new(layer, update)
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
        before = {} if update.bracket else self.footprints(layer)
        update.bytes_out += layer.commit(update.undo)
        if not update.bracket:
            self.check_unmoved(before, layer)

    def swap_in(self, update: Update) -> None:
        """What was prepared goes live: from here on, the engine may not generate."""
        start = time.perf_counter()
        for name, layer in update.prepared.items():
            update.undo.touch()
            update.committed.add(name)
            update.bytes_out += layer.commit(update.undo)
        if update.prepares:
            update.since(start, "swap")

    def footprints(self, *layers: Layer) -> dict[str, Footprint]:
        """Where the live tensors of some layers are, if a ledger is kept."""
        if not self._checks.ledger:
            return {}
        return footprints(item for layer in layers for item in layer.tensors())

    def check_unmoved(self, before: dict[str, Footprint], *layers: Layer) -> None:
        """Raise MovedTensor where one is no longer what it was."""
        check_unmoved(before, self.footprints(*layers))


def _is_new(layer: Layer, update: Update) -> bool:
    """Whether all that is staged of a layer has come with this update."""
    stages = map(layer.stage, layer.targets)
    return all(stage.count <= len(update.staged.get(stage, ())) for stage in stages)
