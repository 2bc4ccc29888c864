"""The live model as the tensors that a sender delivers: which they are, and what is live of them.

Their values are read back out of live memory by the write plan, backwards. Of what a kernel has
packed, or vLLM has made codes of in a way that is not ours, nothing can be read; nor of a tensor
of which other workers hold a part.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping

import torch
from torch import Tensor

from flashquant.errors import ReloadError
from flashquant.plan import Planner, TensorPlan, Write
from flashquant.schemes import Fingerprints
from flashquant.sender import Manifest, TensorSpec, dtype_name, policy_digest
from flashquant.update.bindings import Bindings
from flashquant.update.engine import Engine, Layer
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
        return found

    def manifest(self, version: int, *, settled: bool) -> Manifest:
        """What a complete update brings, and the digest of what is live.

        Args:
            version: how many updates are committed.
            settled: whether what is live is one policy, and nothing waits to become another.

        Raises:
            ReloadError: as `specs`.

        """
        specs = self.specs()
        return Manifest(
            scheme=self._engine.scheme,
            version=version,
            digest=self._digest(specs) if settled else None,
            tensors=specs,
            tied={
                name: home
                for name, home in self._engine.tied.items()
                if home in specs and name not in specs
            },
        )

    def fingerprints(self, specs: Mapping[str, TensorSpec]) -> dict[str, str]:
        """Of the live value of every tensor that can be read back, by name."""
        live = ((name, self.read(name, spec)) for name, spec in specs.items())
        return Fingerprints((name, value) for name, value in live if value is not None).read()

    def _digest(self, specs: Mapping[str, TensorSpec]) -> str | None:
        """Of the live policy; None where not all of it can be read back."""
        found = self.fingerprints(specs)
        return policy_digest(found) if len(found) == len(specs) else None

    def read(self, name: str, spec: TensorSpec) -> Tensor | None:
        """A copy of the live value of a tensor, as it would be sent; None if nothing shows it."""
        entry = self._readable(name, spec)
        if entry is None:
            return None
        homes = {target: self.layer_of(target).held(target) for target in entry.targets}
        value: Tensor | None = None
        for step in entry.steps:
            home = homes[step.target]
            if isinstance(home, str) or home.dtype != spec.torch_dtype:
                return None
            if value is None:
                value = torch.empty(spec.shape, dtype=spec.torch_dtype, device=home.device)
            if isinstance(step, Write):
                step.source_view.into(value).copy_(step.target_view.into(home))
        return value

    def layer_of(self, target: str) -> Layer:
        """The live layer that a parameter belongs to."""
        return self._bindings.homes[target]

    def plan_of(self, name: str, spec: TensorSpec) -> TensorPlan:
        """Where a tensor lands."""
        return self._bindings.of(name, _form(spec)).plan

    def _readable(self, name: str, spec: TensorSpec) -> TensorPlan | None:
        """The plan of a tensor of which all is stored as it comes; None of any other."""
        binding = self._bindings.of(name, _form(spec))
        as_sent = spec.scales is not None or not binding.recipe.makes_codes
        if not as_sent or binding.recipe.calibration is not None:
            return None
        return binding.plan if _is_all_here(binding.plan) else None

    def _specs_of(self, name: str, form: Tensor) -> Iterator[tuple[str, TensorSpec]]:
        """The tensor itself; or its codes, and its scales."""
        binding = self._bindings.of(name, form)
        recipe, shape = binding.recipe, binding.plan.shape
        if not binding.plan.steps:
            return
        if (codes := recipe.takes_codes) is None:
            yield name, TensorSpec(shape=shape, dtype=dtype_name(_sent(recipe, form.dtype)))
            return
        rounds_to = None if recipe.loads is None else dtype_name(recipe.loads)
        yield (
            name,
            TensorSpec(
                shape=shape,
                dtype=dtype_name(codes[0]),
                scales=recipe.scale_name,
                rounds_to=rounds_to,
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


def _is_all_here(entry: TensorPlan) -> bool:
    """Whether every element of a tensor is copied somewhere, and nothing else becomes of it."""
    if not all(isinstance(step, Write) for step in entry.steps):
        return False
    windows = {step.source_view for step in entry.steps if isinstance(step, Write)}
    return sum(window.numel for window in windows) == entry.numel


def _form(spec: TensorSpec) -> Tensor:
    return torch.empty(spec.shape, dtype=spec.torch_dtype, device="meta")
