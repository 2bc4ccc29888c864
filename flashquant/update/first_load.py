"""The checkpoint that an engine starts on, on its way into the engine's own loader.

It is the stream of every later push: what will be quantized then is quantized now.
"""

from __future__ import annotations

from collections.abc import Iterator

from torch import Tensor

from flashquant.plan import NamedTensors, Planner, few_at_a_time
from flashquant.profiles import Calibration
from flashquant.schemes import holds_codes
from flashquant.update.code_statistics import CodeStatistics
from flashquant.update.engine import Engine, scheme_of
from flashquant.update.quantize import Recipe, as_stored


class FirstLoad:
    """Quantizes a checkpoint where its engine stores codes, and notes what it holds.

    Args:
        engine: the model.
        planner: learns the checkpoint's names.
        code_statistics: learns the codes that updates will be compared with.
        calibration: the profile by which pushes are quantized; None where each row is by itself.

    """

    def __init__(
        self,
        engine: Engine,
        planner: Planner,
        code_statistics: CodeStatistics,
        calibration: Calibration | None,
    ) -> None:
        self._engine, self._planner, self._code_statistics = engine, planner, code_statistics
        self._calibration = calibration

    def stream(self, weights: NamedTensors) -> Iterator[tuple[str, Tensor]]:
        """The tensors as the engine's loader is to see them."""
        makes_codes = any(holds_codes(meta.dtype) for meta in self._engine.targets.values())
        if not makes_codes and self._calibration is None:
            for name, tensor in weights:
                self._planner.note(name, tensor)
                yield name, tensor
            return
        for few in few_at_a_time(weights):
            self._planner.learn_together(few)  # several in one run of the loader
            for name, tensor in few:
                yield from self._stored(name, tensor)

    def _stored(self, name: str, tensor: Tensor) -> Iterator[tuple[str, Tensor]]:
        calibration = self._calibration
        # A checkpoint of codes is taken as it is: it is smoothed already.
        quantizes = calibration if calibration and calibration.starts_on_floats else None
        self._planner.note(name, tensor)
        self._planner.learn(name, tensor)
        if calibration is not None:
            calibration.note(name, tensor)
        engine, plan = self._engine, self._planner.plan[name]
        recipe = Recipe(name, plan, engine.targets, quantizes, scheme=scheme_of(name, engine))
        for stored, values in as_stored(recipe, tensor):
            if quantizes is not None:
                quantizes.note_stored(stored, values)
            self._code_statistics.start(stored, values)
            self._planner.note_made(stored, values)
            if not self._placed_beside(recipe, stored, values):
                yield stored, values

    def _placed_beside(self, recipe: Recipe, stored: str, values: Tensor) -> bool:
        """Put the scales of stacked experts beside their codes, if the loader does not know them.

        Of a loader that takes single experts, their number is in every name, and it knows all.
        """
        if stored != recipe.scale_name or values.dim() != 3:
            return False
        plan = self._planner.beside_codes(stored, values)
        if plan is not None:
            self._engine.place(plan, values)
        return plan is not None
