"""What can be known of a name before its tensor comes, bound to the layers of one live engine.

The write plan is data. Here each name of it is bound, once, to the stages and layers that take its
tensors, so that a later push is a look into a dictionary and the work on the tensor itself.

    Binding        one name: what fits, how it is stored, and where that goes
    Destination    where one stored tensor goes: codes, scales, or the tensor itself
    InPlaceWrite   all of it in one call, where nothing is left to decide (in_place.py)
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field

import torch
from torch import Tensor

from flashquant.plan import Fill, Planner, Replay, Step, TensorPlan, Write
from flashquant.profiles import Calibration
from flashquant.schemes import check_dtype, check_form, check_plain
from flashquant.update.engine import Engine, Layer, scheme_of
from flashquant.update.in_place import InPlaceWrite, Window, in_place_write
from flashquant.update.quantize import Recipe, is_float
from flashquant.update.staging import Stage


@dataclass(frozen=True)
class Destination:
    """Where one stored tensor goes: codes, scales, or a tensor that is stored as it comes.

    Attributes:
        plan: its write plan.
        steps: of the plan, each with the layer and the stage that it ends in.
        layers: those that it may complete.
        rows: whether it lands whole and row by row in one stage, so that its codes may be made
            where they belong.

    """

    plan: TensorPlan
    steps: tuple[tuple[Step, Layer, Stage], ...]
    layers: tuple[Layer, ...]
    rows: bool

    @property
    def window(self) -> Window | None:
        """The one window of live memory that all of it goes to, element by element, if so."""
        return self.window_of(lambda layer: layer.homes) if len(self.steps) == 1 else None

    def window_of(self, memory: Callable[[Layer], Mapping[str, Tensor]]) -> Window | None:
        """The same, of the live memory that is named for each layer; padding is there already."""
        steps = [each for each in self.steps if not isinstance(each[0], Fill)]
        if len(steps) != 1:
            return None
        ((step, layer, stage),) = steps
        home = memory(layer).get(step.target)
        if home is None or not isinstance(step, Write):
            return None
        source, view = step.source_view, step.target_view
        whole = source.offset == 0 and source.numel == self.plan.numel
        if whole and source.is_dense and view.is_dense and view.numel:
            return Window(step.target, layer, stage, view, view.into(home))
        return None


@dataclass
class Binding:
    """One name of the trainer's, on one engine.

    Attributes:
        plan: where the tensor itself goes; no steps where the engine's loader leaves it out.
        recipe: how it is stored.
        tie: its plan under the name by which the engine holds it, where that is another one.
        fits: dtypes that may come.
        destinations: by the name of what is stored.
        in_place: what takes all of it in one call, once a tensor of its dtype has come; None where
            something has to be decided anew each time.

    """

    name: str
    plan: TensorPlan
    recipe: Recipe
    tie: TensorPlan | None = None
    fits: set[torch.dtype] = field(default_factory=set)
    destinations: dict[str, Destination] = field(default_factory=dict)
    in_place: InPlaceWrite | None = None
    _learned: torch.dtype | None = None  # what `in_place` was looked for with

    def check(self, sent: object) -> Tensor:
        """The tensor that was sent, if nothing is wrong with it that can be seen without a pass.

        Raises:
            MisfitTensor: it is none, or of another shape or dtype, or holds no values.

        """
        check_plain(self.name, sent)
        tensor: Tensor = sent.detach().resolve_neg()  # type: ignore[attr-defined]  # it is one
        if tensor.shape != self.plan.shape or tensor.is_meta:
            check_form(self.name, tensor, self.plan.shape)
        if tensor.dtype not in self.fits:
            for dtype in self.recipe.dtypes:
                check_dtype(self.name, tensor.dtype, dtype)
            self.fits.add(tensor.dtype)
        return tensor

    def destination_of_codes(self, tensor: Tensor) -> Destination | None:
        """Where the codes of this tensor go, if they can be made right there."""
        found = self.destinations.get(self.name)
        if found is None or not (found.rows and self.recipe.makes_codes and is_float(tensor)):
            return None
        ((_, layer, _),) = found.steps
        return found if layer.device == tensor.device else None

    def learn(self, tensor: Tensor) -> None:
        """A tensor has been taken: see whether the next one of its dtype can be in one call."""
        if self._learned is tensor.dtype:
            return
        self._learned, self.in_place = tensor.dtype, None
        if self.recipe.calibration is not None or not is_float(tensor):
            return
        makes_codes = self.destination_of_codes(tensor) is not None
        names = (self.name, self.recipe.scale_name) if makes_codes else (self.name,)
        found = (self.destinations.get(name) for name in names)
        windows = tuple(w for to in found if to is not None and (w := to.window) is not None)
        if len(windows) == len(names):
            self.in_place = in_place_write(names, self.recipe, tensor, windows)


class Bindings:
    """The bindings of all names that have come by on one live engine.

    Attributes:
        known: by name.

    """

    def __init__(self, engine: Engine, planner: Planner, calibration: Calibration | None) -> None:
        self._engine, self._planner, self._calibration = engine, planner, calibration
        self.known: dict[str, Binding] = {}
        self._homes: dict[str, Layer] = {}
        self._wanted: dict[str, tuple[Stage, ...]] = {}

    def open(self) -> None:
        """Index live layers by parameter: the engine has them from now on."""
        self._homes = {target: layer for layer in self._engine.layers for target in layer.targets}

    @property
    def homes(self) -> Mapping[str, Layer]:
        """The layer of each parameter; none before the engine serves."""
        return self._homes

    def of(self, name: str, sent: object) -> Binding:
        """The binding of a name; the first time it comes by, the engine's loader is watched.

        Raises:
            MisfitTensor: what was sent is no tensor.
            ReloadError: as `Planner.of`.

        """
        binding = self.known.get(name)
        if binding is None:
            check_plain(name, sent)
            plan = self._planner.of(name, sent)  # type: ignore[arg-type]  # it is a tensor
            engine = self._engine
            stored, loaded = engine.stored, engine.targets
            recipe = Recipe(name, plan, stored, self._calibration, loaded, scheme_of(name, engine))
            tie = None if plan.steps else self._planner.tie_of(name, sent)  # type: ignore[arg-type]
            binding = self.known[name] = Binding(name, plan, recipe, tie)
            if recipe.makes_codes and plan.steps:
                binding.destinations[name] = self._bound(plan)
        return binding

    def destination(self, binding: Binding, stored: str, values: Tensor) -> Destination:
        """Where one of the tensors goes that are made of what was sent."""
        found = binding.destinations.get(stored)
        if found is None:
            found = binding.destinations[stored] = self._bound(self._planner.of(stored, values))
        return found

    def is_full(self, layer: Layer) -> bool:
        """Whether everything has arrived that a complete update brings for a layer."""
        stages = self._wanted.get(layer.name)
        if stages is None:
            wanted = self._planner.wanted
            mine = [target for target in layer.targets if target in wanted]
            stages = tuple(layer.stage(target) for target in mine)
            self._wanted[layer.name] = stages
        return all(stage.complete for stage in stages)

    def _bound(self, plan: TensorPlan) -> Destination:
        steps = tuple(
            (step, layer, layer.stage(step.target))
            for step in plan.steps
            for layer in (self._homes[step.target],)
        )
        for step, _, stage in steps:
            stage.expect(self._planner.filled.get(step.target, stage.numel))
        layers = tuple(dict.fromkeys(layer for _, layer, _ in steps))
        return Destination(plan, steps, layers, _lands_by_rows(plan))


def _lands_by_rows(plan: TensorPlan) -> bool:
    """Whether all of a matrix goes, row by row, to one window."""
    if len(plan.steps) != 1 or isinstance(step := plan.steps[0], Replay):
        return False
    if not isinstance(step, Write) or len(plan.shape) != 2:
        return False
    columns = plan.shape[1]
    whole = step.source_view == (plan.shape, (columns, 1), 0)
    return whole and step.target_view.shape == plan.shape and step.target_view.stride[1] == 1
