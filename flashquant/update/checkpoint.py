"""The live model as the tensors that a sender delivers: which they are, and what is live of them.

Their values are read back out of live memory by the write plan, backwards. Of what a kernel has
packed, or vLLM has made codes of in a way that is not ours, nothing can be read; nor of a tensor
of which other workers hold a part.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping

import torch
from torch import Tensor

from flashquant.errors import ReloadError
from flashquant.plan import Planner, Replay, TensorPlan, Write
from flashquant.schemes import Fingerprints
from flashquant.sender import Manifest, TensorSpec, dtype_name, policy_digest
from flashquant.update.bindings import Bindings
from flashquant.update.engine import Engine, Layer
from flashquant.update.in_place import Window
from flashquant.update.quantize import Recipe, is_float


class Checkpoint:
    """What one live engine wants to be sent, and what it holds of that.

    Args:
        engine: the model.
        planner: where its names land.
        bindings: of its names.

    """

    def __init__(self, engine: Engine, planner: Planner, bindings: Bindings) -> None:
        self._engine, self._planner, self._bindings = engine, planner, bindings
        self._known: dict[str, dict[str, TensorSpec]] = {}
        self._windows: dict[str, Window | None] = {}
        self._grouped: dict[str, list[str]] = {}  # by tensor
        self._made: set[str] = set()  # scales that the engine makes itself, of floats

    def specs(self) -> dict[str, TensorSpec]:
        """Every tensor that a complete update brings, by name: codes and scales are two.

        Raises:
            ReloadError: the engine started without a checkpoint, so its names are not known.

        """
        forms = self._planner.forms
        if not forms:
            raise ReloadError(
                "the engine started without a checkpoint (dummy weights), so nobody can tell the "
                "names of its tensors yet. Push one complete set of weights first."
            )
        found: dict[str, TensorSpec] = {}
        for name, form in forms.items():
            if name not in self._known:
                self._known[name] = dict(self._specs_of(name, form))
            found |= self._known[name]
        return {name: spec for name, spec in found.items() if name not in self._made}

    def elsewhere(self, names: Iterable[str]) -> set[str]:
        """Of these, what other workers hold, and this one nothing of: experts, or a stage's layers.

        Scales go with their codes. What is tied is held, under another name.
        """
        if self._engine.is_alone:
            return set()
        found = {name: self._bindings.of(name, form) for name, form in self._planner.forms.items()}
        nothing = {name for name, one in found.items() if not one.plan.steps and one.tie is None}
        return {name for name in names if {name, name.removesuffix("_scale")} & nothing}

    def manifest(self, version: int, *, settled: bool) -> Manifest:
        """What a complete update brings, and the digest of what is live.

        Args:
            version: how many updates are committed.
            settled: whether what is live is one policy.

        Raises:
            ReloadError: as `specs`.

        """
        specs = self.specs()
        return Manifest(
            scheme=self.scheme,
            version=version,
            digest=self._digest(specs) if settled and not self._waits else None,
            tensors=specs,
            tied={
                name: home
                for name, home in self._engine.tied.items()
                if home in specs and name not in specs
            },
        )

    @property
    def scheme(self) -> str:
        """The canonical name of the scheme that the engine stores."""
        return self._engine.scheme

    @property
    def _waits(self) -> bool:
        """Whether something has arrived in part, and would be read in the place of what is live."""
        return any(layer.missing for layer in self._engine.layers)

    def fingerprints(self, specs: Mapping[str, TensorSpec]) -> dict[str, str]:
        """Of the live value of every tensor that can be read back, by name."""
        return Fingerprints(self.readable(specs)).read()

    def readable(self, specs: Mapping[str, TensorSpec]) -> Iterator[tuple[str, Tensor]]:
        """The live value of every tensor that can be read back, by name."""
        for name, spec in specs.items():
            if self.shows(name, spec):
                yield name, self.read(name, spec)

    def _digest(self, specs: Mapping[str, TensorSpec]) -> str | None:
        """Of the live policy; None where not all of it can be read back."""
        if not all(self.shows(name, spec) for name, spec in specs.items()):
            return None
        return policy_digest(self.fingerprints(specs))

    def shows(self, name: str, spec: TensorSpec) -> bool:
        """Whether live memory shows a tensor, all of it, as it would be sent."""
        binding = self._bindings.of(name, _form(spec))
        as_sent = spec.scales is not None or not binding.recipe.makes_codes
        if not as_sent or binding.recipe.calibration is not None or not _is_all_here(binding.plan):
            return False
        homes = (self._layer_of(target).held(target) for target in binding.plan.targets)
        return all(isinstance(h, Tensor) and h.dtype == spec.torch_dtype for h in homes)

    def read(self, name: str, spec: TensorSpec) -> Tensor:
        """A copy of the live value of a tensor that live memory shows, as it would be sent."""
        entry = self.plan_of(name, spec)
        homes = {target: self._layer_of(target).held(target) for target in entry.targets}
        device = next(home.device for home in homes.values() if isinstance(home, Tensor))
        value = torch.empty(spec.shape, dtype=spec.torch_dtype, device=device)
        for step in entry.steps:
            home = homes[step.target]
            if isinstance(step, Write) and isinstance(home, Tensor):
                step.source_view.into(value).copy_(step.target_view.into(home))
        return value

    def window(self, name: str, spec: TensorSpec) -> Window | None:
        """The live memory, dense, that is all of a tensor as it is sent; None if it may not be
        overwritten there. Asked once: nothing moves."""
        if name not in self._windows:
            self._windows[name] = self._window(name, spec)
        return self._windows[name]

    def _window(self, name: str, spec: TensorSpec) -> Window | None:
        if not self.shows(name, spec):
            return None
        binding = self._bindings.of(name, _form(spec))
        destination = self._bindings.destination(binding, name, _form(spec))
        found = destination.window_of(lambda layer: layer.editable)
        return found if found is not None and found.live.is_contiguous() else None

    def groups(self, specs: Mapping[str, TensorSpec]) -> list[list[str]]:
        """The tensors that go live together, because they are parts of the same layers."""
        if self._grouped.keys() != specs.keys():
            self._grouped = self._groups(specs)
        return list({id(group): group for group in self._grouped.values()}.values())

    def _groups(self, specs: Mapping[str, TensorSpec]) -> dict[str, list[str]]:
        """The group of each tensor."""
        group_of: dict[str, list[str]] = {}
        of_layer: dict[str, list[str]] = {}
        for name, spec in specs.items():
            group = group_of[name] = [name]
            for layer in {
                self._layer_of(target).name for target in self.plan_of(name, spec).targets
            }:
                other = of_layer.setdefault(layer, group)
                if other is not group:
                    group = _joined(other, group, group_of, of_layer)
        return group_of

    def _layer_of(self, target: str) -> Layer:
        """The live layer that a parameter belongs to."""
        return self._bindings.homes[target]

    def layers(self, specs: Mapping[str, TensorSpec]) -> dict[str, Layer]:
        """The layer of each parameter that some tensors land in."""
        plans = (self.plan_of(name, spec) for name, spec in specs.items())
        return {target: self._layer_of(target) for plan in plans for target in plan.targets}

    def plan_of(self, name: str, spec: TensorSpec) -> TensorPlan:
        """Where a tensor lands."""
        return self._bindings.of(name, _form(spec)).plan

    def _specs_of(self, name: str, form: Tensor) -> Iterator[tuple[str, TensorSpec]]:
        """The tensor itself; or its codes, and its scales."""
        binding = self._bindings.of(name, form)
        recipe, shape = binding.recipe, binding.plan.shape
        if not binding.plan.steps:
            return
        if (codes := recipe.takes_codes) is None:
            sent = _sent(recipe, form.dtype)
            if recipe.makes_codes:
                self._made.add(recipe.scale_name)
            try:
                yield name, TensorSpec(shape=shape, dtype=dtype_name(sent))
            except ValueError as wrong:
                raise ReloadError(
                    f"{name} is stored as {sent}, which no bundle holds ({wrong}). Push this "
                    "model by flashquant.reload_weights."
                ) from wrong
            return
        rounds_to = None if recipe.loads is None else dtype_name(recipe.loads)
        yield (
            name,
            TensorSpec(
                shape=shape,
                dtype=dtype_name(codes[0]),
                scales=recipe.scale_name,
                rounds_to=rounds_to,
                scheme=None if recipe.scheme == self.scheme else recipe.scheme,
            ),
        )
        yield (
            recipe.scale_name,
            TensorSpec(shape=(*shape[:-1], 1), dtype=dtype_name(codes[1])),
        )


def _sent(recipe: Recipe, dtype: torch.dtype) -> torch.dtype:
    """In which dtype a tensor is sent that is no codes.

    Args:
        recipe: how it is stored.
        dtype: that of the checkpoint.

    """
    if recipe.loads is not None:
        return recipe.loads
    if recipe.makes_codes or recipe.calibration is not None:
        return dtype if is_float(torch.empty(0, dtype=dtype)) else torch.bfloat16
    return recipe.dtypes[0]


def _joined(
    one: list[str],
    other: list[str],
    group_of: dict[str, list[str]],
    of_layer: dict[str, list[str]],
) -> list[str]:
    """Two groups become the first one."""
    one += other
    group_of |= dict.fromkeys(other, one)
    of_layer |= {layer: one for layer, group in of_layer.items() if group is other}
    return one


def _is_all_here(entry: TensorPlan) -> bool:
    """Whether every element of a tensor is copied somewhere, and nothing else becomes of it but
    padding around it."""
    if any(isinstance(step, Replay) for step in entry.steps):
        return False
    windows = {step.source_view for step in entry.steps if isinstance(step, Write)}
    return sum(window.numel for window in windows) == entry.numel


def _form(spec: TensorSpec) -> Tensor:
    return torch.empty(spec.shape, dtype=spec.torch_dtype, device="meta")
