"""The way of every name the trainer may send, learned from the engine's own loader, once.

A checkpoint's names are learned together, at the first one that is asked for:
loaders read ahead, and one run is cheaper than hundreds.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import replace

import torch
from torch import Tensor

from flashquant.errors import ReloadError, UnknownWeight
from flashquant.plan.loader import Loader
from flashquant.plan.trace import trace, trace_one
from flashquant.plan.weights import NamedTensors
from flashquant.plan.wrappers import hint
from flashquant.plan.writes import Replay, TensorPlan, WritePlan, beside, elements_of


class Planner:
    """The write plan of one engine, and what its checkpoint held."""

    def __init__(self, loader: Loader) -> None:
        self.plan = WritePlan()
        self._loader = loader
        self._checkpoint: dict[str, tuple[torch.Size, torch.dtype]] = {}
        self._made: dict[str, tuple[torch.Size, torch.dtype]] = {}  # of it: scales, most of all
        self._wanted: dict[str, None] | None = None
        self._elements: dict[str, int] | None = None
        self._beside: set[str] = set()  # scales that the loader does not know
        self._ties: dict[str, TensorPlan] = {}

    def open(self) -> None:
        """The engine serves; what became one parameter while it loaded, has one name now."""
        entries = (self.plan[name] for name in self.plan.names)
        kept = (entry for entry in entries if self._loader.targets.keys() >= set(entry.targets))
        self.plan, self._wanted, self._elements = WritePlan(kept), None, None

    def note(self, name: str, tensor: Tensor) -> None:
        """The checkpoint that the engine starts on holds this tensor."""
        self._checkpoint[name] = (tensor.shape, tensor.dtype)
        self._wanted = None

    def note_made(self, name: str, tensor: Tensor) -> None:
        """A tensor of the checkpoint was stored as this one, or as several; so will pushes be."""
        if name not in self._checkpoint:
            self._made[name] = (tensor.shape, tensor.dtype)

    def beside_codes(self, name: str, scales: Tensor) -> TensorPlan | None:
        """The plan of scales that the loader knows by no name, beside their codes.

        A loader that renames by the end of a name (GraniteMoE) takes a weight, and no scale of it.

        Args:
            name: of the scales, that was made of the weight's.
            scales: `[E, N, 1]`.

        Returns:
            None where the loader knows the name: it places them itself.

        Raises:
            ReloadError: as `beside`.

        """
        self.learn_together([(name, scales)])
        if name not in self.plan:
            self.plan.add({name: beside(name, self.plan[name.removesuffix("_scale")])})
            self._beside.add(name)
        return self.plan[name] if name in self._beside else None

    def refused_of_made(self) -> str | None:
        """The first name made of the checkpoint that the engine's loader does not take."""
        self._learn_forms(self._made)
        return next((name for name in self._made if name not in self.plan), None)

    def learn_together(self, tensors: NamedTensors) -> None:
        """Watch the loader take some tensors in one run; what it refuses is not learned."""
        self._learn_forms({name: (tensor.shape, tensor.dtype) for name, tensor in tensors})

    def learn(self, name: str, tensor: Tensor) -> None:
        """Watch the loader take this one tensor, unless that has been done.

        Raises:
            UnknownWeight: the loader knows no such name; says which one is near.
            ReloadError: the loader refuses it, or does what a plan cannot say.

        """
        if name in self.plan:
            return
        try:
            found = self._trace_one(name, tensor.shape, tensor.dtype)
        except ReloadError as refusal:
            if self.tie_of(name, tensor) is not None:
                self.plan.add({name: TensorPlan(name, tuple(tensor.shape), tensor.dtype, ())})
                return
            # What a loader says of a name it does not know depends on where it stumbles; that
            # the checkpoint had no such name is what the trainer can act on.
            if name in self._checkpoint or not (
                self._checkpoint or isinstance(refusal, UnknownWeight)
            ):
                raise
            raise UnknownWeight(f"{refusal}.{hint(name, self._checkpoint)}") from refusal
        if not found[name].steps and name not in self._checkpoint:
            self._check_layer(name)
        self.plan.add(found)

    def _check_layer(self, name: str) -> None:
        """Loaders drop a bias that a layer has not; and each of a layer that they do not know.

        Raises:
            UnknownWeight: they know no other tensor of this layer, either.

        """
        layer = name.rpartition(".")[0]
        for leaf, form in self._beside_such(name).items():
            other = f"{layer}.{leaf}"
            try:
                if self._trace_one(other, *form)[other].steps:
                    return
            except UnknownWeight as refusal:
                unknown = f"the engine's loader knows nothing of {layer!r}, so no {name!r}"
                raise UnknownWeight(f"{unknown}.{hint(name, self._checkpoint)}") from refusal
            except ReloadError:  # it knows the name, and refuses something else
                return

    def _beside_such(self, name: str) -> dict[str, tuple[torch.Size, torch.dtype]]:
        """What the checkpoint has beside a tensor whose name ends as this one does."""
        end = ".".join(name.rsplit(".", 2)[-2:])
        like = next((known for known in self._checkpoint if f".{known}".endswith(f".{end}")), None)
        if like is None:
            return {}
        layer = like.rpartition(".")[0]
        mine = {k: form for k, form in self._checkpoint.items() if k.rpartition(".")[0] == layer}
        return {k.rpartition(".")[2]: form for k, form in mine.items() if k != like}

    def _trace_one(self, name: str, shape: torch.Size, dtype: torch.dtype) -> dict[str, TensorPlan]:
        with self._loader.laid_out():
            meta = _meta(shape, dtype)
            return trace_one(self._loader.load, name, meta, self._loader.targets)

    def knows(self, name: str, tensor: Tensor) -> bool:
        """Whether something becomes of a tensor of this name."""
        if self.expects(name):
            return True
        try:
            return bool(self.of(name, tensor).steps)
        except ReloadError:
            return False

    def expects(self, name: str) -> bool:
        """Whether the checkpoint held this tensor, or it was made of one that it held."""
        return name in self._checkpoint or name in self._made

    def of(self, name: str, tensor: Tensor) -> TensorPlan:
        """Where a tensor lands; the first time it comes by, the engine's loader is watched.

        Raises:
            ReloadError: as `learn`.

        """
        if name not in self.plan:
            if (codes := self._codes_of(name)) is not None:
                self.plan.add({name: beside(name, codes)})
                return self.plan[name]
            if name in self._checkpoint or name in self._made:
                self._learn_forms({**self._checkpoint, **self._made})
            self.learn(name, tensor)
        return self.plan[name]

    def tie_of(self, name: str, tensor: Tensor) -> TensorPlan | None:
        """Where a tensor belongs that the loader leaves out, for it takes it under another name.

        None where it leaves it out for another reason.
        """
        found = self._ties.get(name)
        if found is None and self._loader.tied:
            found = self._tie_of(name, tensor)
            if found is not None:
                self._ties[name] = found
        return found

    def _tie_of(self, name: str, tensor: Tensor) -> TensorPlan | None:
        tied, meta = self._loader.tied, _meta(tensor.shape, tensor.dtype)
        try:
            with self._loader.apart() as targets:
                plan = trace_one(self._loader.load, name, meta, targets)[name]
        except ReloadError:
            return None
        if plan.steps:
            steps = tuple(replace(step, target=tied.get(step.target, "")) for step in plan.steps)
            known = all(step.target and not isinstance(step, Replay) for step in steps)
            return replace(plan, steps=steps) if known else None
        # Before 0.31, vLLM's loaders leave them out by name, whatever they are tied to.
        home = next((tied[path] for path in tied if f".{path}".endswith(f".{name}")), None)
        self._learn_forms(self._checkpoint)
        entries = (self.plan[known] for known in self.plan.names)
        firsts = (e for e in entries if e.targets == (home,) and e.shape == tuple(tensor.shape))
        first = next(firsts, None)
        return None if first is None or first.needs_loader else replace(first, name=name)

    @property
    def forms(self) -> Mapping[str, Tensor]:
        """Every name of the checkpoint, on meta as it was there; of an engine that started without
        one, every name that has come."""
        if self._checkpoint:
            return {name: _meta(*form) for name, form in self._checkpoint.items()}
        entries = (self.plan[name] for name in self.plan.names)
        return {entry.name: _meta(entry.shape, entry.dtype) for entry in entries if entry.steps}

    def _learn_forms(self, forms: Mapping[str, tuple[torch.Size, torch.dtype]]) -> None:
        new = {name: _meta(*form) for name, form in forms.items() if name not in self.plan}
        if new:
            with self._loader.laid_out():
                self.plan.add(trace(self._loader.load, new, self._loader.targets))

    @property
    def landed(self) -> Mapping[str, tuple[str, ...]]:
        """The parameters in which each tensor of the checkpoint has landed, by its name."""
        return {name: self._entry(name).targets for name in self._checkpoint}

    def _entry(self, name: str) -> TensorPlan:
        """The plan of a tensor that the checkpoint held."""
        return (
            self.plan[name] if name in self.plan else self.of(name, _meta(*self._checkpoint[name]))
        )

    @property
    def wanted(self) -> Mapping[str, None]:
        """The parameters that a complete update fills: those that the checkpoint filled.

        An engine that started without one (dummy weights) needs all of them, without the buffers.
        """
        if not self._checkpoint:
            optional = self._loader.optional
            return dict.fromkeys(t for t in self._loader.targets if t not in optional)
        if self._wanted is None:
            self._wanted = self._filled()
        return self._wanted

    @property
    def filled(self) -> Mapping[str, int]:
        """How many elements of each parameter the checkpoint filled, of those where that is known.

        The rest is padding: vLLM rounds the width of experts up to what their kernel multiplies.
        """
        if self._elements is None:
            stored = {**self._checkpoint, **self._made}
            self._learn_forms(stored)
            self._elements = elements_of(self.plan[name] for name in stored if name in self.plan)
        return self._elements

    def _filled(self) -> dict[str, None]:
        return dict.fromkeys(target for targets in self.landed.values() for target in targets)

    def _codes_of(self, name: str) -> TensorPlan | None:
        """The plan of the weight whose scales these are, if they are made here and only here."""
        weight = name.removesuffix("_scale")
        if weight == name or name in self._checkpoint or weight not in self.plan:
            return None
        scales = [f"{target}_scale" for target in self.plan[weight].targets]
        stored, targets = self._loader.stored, self._loader.targets
        made = all(scale in stored and scale not in targets for scale in scales)
        return self.plan[weight] if scales and made else None

    @property
    def replayed(self) -> frozenset[str]:
        """The parameters that the engine's loader writes itself, because it does more than copy."""
        return frozenset(
            step.target
            for name in self.plan.names
            for step in self.plan[name].steps
            if isinstance(step, Replay)
        )


def _meta(shape: Iterable[int], dtype: torch.dtype) -> Tensor:
    return torch.empty(tuple(shape), dtype=dtype, device="meta")
