"""What can be known of a tensor before it comes: where it lands, bound to the stages that take it.

The write plan is data. Here each name of it is tied, once, to the stages and layers of one live
engine, so that a later push is a look into a dictionary and the work on the tensor itself.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field

import torch
from torch import Tensor

from flashquant.plan import Planner, Replay, Step, TensorPlan, Write
from flashquant.profiles import Calibration
from flashquant.schemes import check_dtype, check_form, check_plain
from flashquant.update.engine import Engine, Layer
from flashquant.update.quantize import Recipe, is_float
from flashquant.update.staging import Stage


@dataclass(frozen=True)
class Landing:
    """Where one stored tensor goes: codes, scales, or a tensor that is stored as it comes.

    Attributes:
        steps: of its plan, each with the layer and the stage that it ends in.
        layers: those that it may complete.
        rows: whether it lands whole and row by row in one stage, so that its codes may be made
            where they belong.

    """

    entry: TensorPlan
    steps: tuple[tuple[Step, Layer, Stage], ...]
    layers: tuple[Layer, ...]
    rows: bool


@dataclass
class Way:
    """One name of the trainer's, on one engine."""

    name: str
    entry: TensorPlan
    recipe: Recipe
    tie: TensorPlan | None = None  # of what the engine holds under another name
    fits: set[torch.dtype] = field(default_factory=set)  # dtypes that may come
    landings: dict[str, Landing] = field(default_factory=dict)  # by the name of what is stored

    def check(self, sent: object) -> Tensor:
        """The tensor that was sent, if nothing is wrong with it that can be seen without a pass.

        Raises:
            MisfitTensor: it is none, or of another shape or dtype, or holds no values.

        """
        check_plain(self.name, sent)
        tensor: Tensor = sent.detach()  # type: ignore[attr-defined]  # it is one
        if tensor.shape != self.entry.shape or tensor.is_meta:
            check_form(self.name, tensor, self.entry.shape)
        if tensor.dtype not in self.fits:
            for dtype in self.recipe.dtypes:
                check_dtype(self.name, tensor.dtype, dtype)
            self.fits.add(tensor.dtype)
        return tensor

    def landing_of_codes(self, tensor: Tensor) -> Landing | None:
        """Where the codes of this tensor go, if they can be made right there."""
        landing = self.landings.get(self.name)
        if landing is None or not (landing.rows and self.recipe.makes_codes and is_float(tensor)):
            return None
        ((_, layer, _),) = landing.steps
        return landing if layer.device == tensor.device else None


class Ways:
    """The ways of all names that have come by on one live engine."""

    def __init__(self, engine: Engine, routes: Planner, calibration: Calibration | None) -> None:
        self._engine, self._routes, self._calibration = engine, routes, calibration
        self._ways: dict[str, Way] = {}
        self._homes: dict[str, Layer] = {}
        self._wanted: dict[str, tuple[Stage, ...]] = {}

    def open(self) -> None:
        """The engine has its live layers."""
        self._homes = {target: layer for layer in self._engine.layers for target in layer.targets}

    @property
    def homes(self) -> Mapping[str, Layer]:
        """The layer of each parameter; none before the engine serves."""
        return self._homes

    def of(self, name: str, sent: object) -> Way:
        """The way of a name; the first time it comes by, the engine's loader is watched.

        Raises:
            MisfitTensor: what was sent is no tensor.
            ReloadError: as `Planner.of`.

        """
        way = self._ways.get(name)
        if way is None:
            check_plain(name, sent)
            entry = self._routes.of(name, sent)  # type: ignore[arg-type]  # it is a tensor
            engine = self._engine
            recipe = Recipe(name, entry, engine.stored, self._calibration, engine.targets)
            tie = None if entry.steps else self._routes.tie_of(name, sent)  # type: ignore[arg-type]
            way = self._ways[name] = Way(name, entry, recipe, tie)
            if recipe.makes_codes and entry.steps:
                way.landings[name] = self._landing(entry)
        return way

    def landing(self, way: Way, stored: str, values: Tensor) -> Landing:
        """Where one of the tensors goes that are made of what was sent."""
        landing = way.landings.get(stored)
        if landing is None:
            landing = way.landings[stored] = self._landing(self._routes.of(stored, values))
        return landing

    def is_full(self, layer: Layer) -> bool:
        """Whether everything has arrived that a complete update brings for a layer."""
        stages = self._wanted.get(layer.name)
        if stages is None:
            wanted = self._routes.wanted
            mine = [target for target in layer.targets if target in wanted]
            stages = tuple(layer.stage(target) for target in mine)
            self._wanted[layer.name] = stages
        return all(stage.complete for stage in stages)

    def _landing(self, entry: TensorPlan) -> Landing:
        steps = tuple(
            (step, layer, layer.stage(step.target))
            for step in entry.steps
            for layer in (self._homes[step.target],)
        )
        layers = tuple(dict.fromkeys(layer for _, layer, _ in steps))
        return Landing(entry, steps, layers, _lands_by_rows(entry))


def _lands_by_rows(entry: TensorPlan) -> bool:
    """Whether all of a matrix goes, row by row, to one window."""
    if len(entry.steps) != 1 or isinstance(step := entry.steps[0], Replay):
        return False
    if not isinstance(step, Write) or len(entry.shape) != 2:
        return False
    columns = entry.shape[1]
    whole = step.source_view == (entry.shape, (columns, 1), 0)
    return whole and step.target_view.shape == entry.shape and step.target_view.stride[1] == 1
