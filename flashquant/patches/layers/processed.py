"""From staged checkpoint tensors to what the kernels of one layer read.

Two roads, chosen by whether vLLM processes the layer at all:

    direct  nothing is made of its parameters: new values are copied over them
    staged  vLLM packs, transposes or quantizes them: the same processing runs on a
            twin of this one layer, and the results are carried over in place

Modules that share a parameter (a tied head and the embeddings) are one layer
here: whatever any of them derived from it (a packed copy) is made anew.
"""

from __future__ import annotations

import contextlib
import functools
from collections import defaultdict
from collections.abc import Callable, Generator, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager
from typing import Any, cast

import torch
from torch import Tensor, nn

from flashquant.errors import ReloadError, UnsupportedEngine
from flashquant.patches.layers import cpu, kernel_state
from flashquant.patches.layers import shard_maxima as shards
from flashquant.patches.layers.aliases import Borrowed
from flashquant.patches.layers.base import StagedLayer, belong_together
from flashquant.patches.layers.blueprint import LayerBlueprint
from flashquant.patches.layers.direct import method_of
from flashquant.patches.layers.kernel_state import Carry
from flashquant.patches.layers.pass_through import handed_on
from flashquant.plan import Fill, Write
from flashquant.update import Reach, UndoLog, digests

# What kind of module hands on which parameters, and as which leaves.
Learned = dict[tuple[object, ...], Mapping[str, tuple[str, ...]]]
Context = Callable[[], AbstractContextManager[object]]


class LiveLayer(StagedLayer):
    """One layer of a serving model: what has arrived for it, and how it gets in."""

    def __init__(
        self,
        blueprints: Sequence[LayerBlueprint],
        loaded: Mapping[str, str],
        context: Context,
        device: torch.device,
        learned: Learned,
        stale: Sequence[Borrowed] = (),
    ) -> None:
        """Args:
        blueprints: the modules of the layer; the first one names it.
        loaded: the fingerprints of their parameters, taken just before processing.
        context: the surroundings in which vLLM processes layers.
        device: where staged tensors live.
        learned: what watching layers of the same kind has shown; shared by all.
        stale: what other layers hold of its parameters as they were loaded.

        """
        self._stale = tuple(one for one in stale if one.target in targets_of(blueprints))
        self._context = context
        self._metas = {
            target: meta
            for blueprint in blueprints
            for name, target in blueprint.targets.items()
            if (meta := blueprint.parameters[name]) is not None
        }
        super().__init__(tuple(blueprints), self._metas, device)
        self._learned = learned
        self.compared: frozenset[str] = frozenset()  # with what comes under their other names
        self._prepared: tuple[Carry, dict[str, str]] | None = None
        self._digests = {target: loaded.get(target, "") for target in self._metas}
        # Processing may rewrite a parameter without changing its layout, so only
        # values show whether it is still the one that was loaded.
        standing = ((target, self._read_back(target)) for target in self._metas)
        found = digests((target, value) for target, value in standing if value is not None)
        self._kept = {target for target in found if found[target] == loaded.get(target)}
        # Of a deferred attention: what its processing makes. Cache scales and whatever its
        # kernels allocate while they run are not.
        self._made: dict[str, frozenset[str]] = {}

    def rehearse(self) -> None:
        """Make everything of zeros once that is to be learned from twins, before the engine serves.

        Later, its cache may have taken the memory that a twin needs. What an attention derives
        from this layer is looked at, too.

        Raises:
            UnsupportedEngine: it comes out otherwise than it lies in the live model.

        """
        _ = self._alone, self._echoes
        if not any(blueprint.sources for blueprint in self.blueprints):
            return
        values = {t: torch.zeros_like(m, device=self.device) for t, m in self._metas.items()}
        with self._context():
            for blueprint, twin in list(self._twins(values)):
                if blueprint.sources:
                    self._made[blueprint.name] = _check_made(blueprint, twin)
                kernel_state.take_apart(twin)

    @property
    def road(self) -> str:
        """`staged` (processed on a twin) or `direct` (nothing to process)."""
        processed = any(method_of(blueprint.module) for blueprint in self.blueprints)
        return "staged" if processed else "direct"

    @property
    def missing(self) -> tuple[str, ...]:
        """The parameters that must still arrive before anything staged can go live."""
        started = {target for target, stage in self._stages.items() if stage.started}
        incomplete = {target for target, stage in self._stages.items() if not stage.complete}
        if not started or not incomplete:
            return ()
        needed = started
        if started - self._alone.keys():
            needed = started | {
                target
                for target in self._metas.keys() - self._alone.keys()
                if target not in self._kept or self._is_moving(target)
            }
        return tuple(target for target in self._stages if target in needed & incomplete)

    def _settle_in(self, step: Write | Fill, undo: UndoLog, reach: Reach) -> None:
        """A layer with a single parameter that arrives whole needs no stage: it is
        written where it lives, and the undo log keeps what was there.
        """
        stage = self._stages[step.target]
        whole = isinstance(step, Write) and step.target_view.numel == stage.numel
        alone = whole and len(self._stages) == 1 and reach is not Reach.NOTHING
        live = self._in_place(step.target) if alone else None
        if live is not None:
            undo.remember(live)
            stage.adopt(live)

    def _held_live(self, target: str) -> Tensor | str:
        prepared = {} if self._prepared is None else self._prepared[1]
        if target in prepared:
            return prepared[target]
        live = self._read_back(target) if target in self._kept else None
        return self._digests[target] if live is None else live

    def drop(self) -> None:
        """Forget whatever has arrived or was prepared; the live layer stays as it is."""
        self._prepared = None
        super().drop()

    def prepare(self, undo: UndoLog) -> None:
        """Process what is staged, and keep the result beside the live layer."""
        self._check_ties()
        staged = {t: s.memory(self.device) for t, s in self._stages.items() if s.started}
        packed = digests(self._to_be_hidden(staged))
        if staged.keys() <= self._alone.keys():
            carry = Carry()
            for target, values in staged.items():
                for live in self._alone[target]:
                    carry.copy(live, values)
        else:
            homes = cpu.Homes()
            for target, values in staged.items():
                if (live_home := self._in_place(target)) is not None:
                    homes[values.data_ptr()] = live_home
            standing = {t: self._standing(t) for t in self._stages if t not in staged}
            making = self._processed({**staged, **standing})
            with cpu.handlers_read(homes), contextlib.closing(making) as parts:
                carry = Carry.of(parts)
            if homes.refused:
                return  # it waits as it is, and is processed when it goes live
        for tensor, target, view in self._stale:
            if target in staged:
                carry.copy(tensor, view.into(staged[target]))
        carry.remember(undo, soon=False)
        self._prepared = carry, packed
        for stage in self._stages.values():
            stage.clear()

    def commit(self, undo: UndoLog) -> int:
        """Make what is staged, or was prepared, live, in place, and free the stage.

        Returns:
            Bytes written into live tensors.

        """
        if self._prepared is not None:
            carry, packed = self._prepared
            for target, value in packed.items():
                self._note_digest(target, value, undo)
            written = carry.apply()
            undo.hold(carry)
            self.drop()
            return written
        self._check_ties()
        started = {target for target, stage in self._stages.items() if stage.started}
        staged = {target: self._stages[target].memory(self.device) for target in started}
        for target, value in digests(self._to_be_hidden(staged)).items():
            self._note_digest(target, value, undo)
        self._refresh(started, undo)
        if started <= self._alone.keys():
            written = sum(self._hand_on(target, undo) for target in started)
        else:
            written = self._process(undo)
        self.drop()
        return written

    def tensors(self) -> Iterator[tuple[str, Tensor]]:
        """Every live tensor of the layer, by full name."""
        for blueprint in self.blueprints:
            made = self._made.get(blueprint.name)
            for path, tensor in kernel_state.tensors(blueprint.module):
                if made is None or path in made:
                    yield f"{blueprint.name}.{path}", tensor

    def contents(self) -> Iterator[tuple[str, Tensor | str]]:
        """What the kernels read, by full name: tensors, and digests of packed memory.

        A oneDNN handler shows no bytes; the digest of what it was packed from
        stands for them.
        """
        for blueprint in self.blueprints:
            leaves = self._leaves(blueprint, blueprint.module)
            for path, leaf in leaves.items():
                if isinstance(leaf, Tensor):
                    yield f"{blueprint.name}.{path}", leaf
            if not all(isinstance(leaf, Tensor) for leaf in leaves.values()):
                for name, target in blueprint.targets.items():
                    yield f"{blueprint.name}.<packed>.{name}", self._digests[target]

    @functools.cached_property
    def _alone(self) -> dict[str, tuple[Tensor, ...]]:
        """Parameters that go live by themselves, and the live tensors that are them.

        Scales never do, though a kernel may read them as they come: they belong to their codes.
        A layer's only parameter has nobody to wait for, so nothing is to be learned.
        """
        if len(self._stages) == 1 and self.road == "staged":
            return {}
        if any(blueprint.sources for blueprint in self.blueprints):
            return {}  # an attention makes something of them, whatever their own layer does
        homes: dict[str, list[Tensor]] = {}
        bound: set[str] = set()
        for blueprint in self.blueprints:
            copies, leaves = self._copies(blueprint), kernel_state.leaves(blueprint.module)
            for name, target in blueprint.targets.items():
                found = [leaves[path] for path in copies.get(name, ())]
                homes.setdefault(target, []).extend(t for t in found if isinstance(t, Tensor))
                scales = any(belong_together(target, other) for other in self._metas)
                bound |= {target} if scales or not found else set()
        return {target: tuple(found) for target, found in homes.items() if target not in bound}

    @functools.cached_property
    def _echoes(self) -> frozenset[str]:
        """The modules that hold nothing but what one before them holds, as a tied head may.

        What goes into that one has gone into these.
        """
        if any(blueprint.sources for blueprint in self.blueprints):
            return frozenset()  # an attention may want to read them
        echoes, held = set(), set[int]()
        for blueprint in self.blueprints:
            mine = {id(leaf) for leaf in kernel_state.leaves(blueprint.module).values()}
            if mine <= held:
                echoes.add(blueprint.name)
            held |= mine
        return frozenset(echoes)

    def _copies(self, blueprint: LayerBlueprint) -> Mapping[str, tuple[str, ...]]:
        """What processing only hands on, learned once for each kind of module."""
        method = method_of(blueprint.module)
        if method is None:
            return {name: (name,) for name in blueprint.targets}
        form = {name: self._metas[target] for name, target in blueprint.targets.items()}
        kind = (
            type(blueprint.module),
            type(method),
            *((name, meta.shape, meta.dtype) for name, meta in form.items()),
        )
        if kind not in self._learned:
            with self._context():
                values = {
                    name: torch.zeros_like(meta, device=self.device) for name, meta in form.items()
                }
                with shards.answered_by(shards.Maxima(())):
                    self._learned[kind] = handed_on(blueprint.build(values), values)
        return self._learned[kind]

    def _is_moving(self, target: str) -> bool:
        """Whether any of a parameter has arrived, or of the codes or scales it goes with."""
        return any(
            stage.started and (other == target or belong_together(other, target))
            for other, stage in self._stages.items()
        )

    def _hand_on(self, target: str, undo: UndoLog) -> int:
        """Copy a staged parameter over the live tensors that are it."""
        staged = self._stages[target].memory(self.device)
        for live in self._alone[target]:
            if live.data_ptr() != staged.data_ptr():
                undo.remember(live)
                live.detach().copy_(staged)
        return sum(live.nbytes for live in self._alone[target])

    def _process(self, undo: UndoLog) -> int:
        """Run vLLM's processing on a twin of each module, and carry the results over."""
        values, written = {}, 0
        for target in self._stages:
            values[target], moved = self._settle(target, undo)
            written += moved
        # Closed at once if something fails: it holds what vLLM has set for the whole process.
        with contextlib.closing(self._processed(values)) as parts:
            for carry in parts:
                carry.remember(undo)
                written += carry.apply()
                del carry  # and with it what it replaced, before the next one is made
        return written

    def _processed(self, values: Mapping[str, Tensor]) -> Generator[Carry, None, None]:
        """What vLLM's processing makes of these values, beside what is live.

        One module at a time, so that no more than one is held, unless one reads another.
        """
        with self._context():
            twins = self._twins(values)
            if any(blueprint.sources for blueprint in self.blueprints):
                twins = iter(list(twins))
            for blueprint, twin in twins:
                carry = Carry()
                fresh, live = (self._leaves(blueprint, one) for one in (twin, blueprint.module))
                carry.add(fresh, live, blueprint.name)
                kernel_state.take_apart(twin)
                yield carry
                del carry, fresh, live

    def _twins(self, values: Mapping[str, Tensor]) -> Iterator[tuple[LayerBlueprint, nn.Module]]:
        """Every module of the layer, built anew and processed in vLLM's own order."""
        instead: dict[int, object] = {}
        for blueprint in self.blueprints:
            if blueprint.name in self._echoes:
                continue
            if method_of(blueprint.module) is not None and not blueprint.sources:
                mine = {name: values[target] for name, target in blueprint.targets.items()}
                twin = instead[id(blueprint.module)] = blueprint.build(mine)
                with shards.answered_by(self._maxima(blueprint)):
                    cast(Any, twin).quant_method.process_weights_after_loading(twin)
                yield blueprint, twin
        for blueprint in self.blueprints:
            if blueprint.sources:  # an attention comes last, and reads the others
                handed = {key: values[target] for key, target in blueprint.sources.items()}
                twin = blueprint.build({}, {**handed, **instead})
                cast(Any, twin).process_weights_after_loading(torch.get_default_dtype())
                yield blueprint, twin

    def _leaves(self, blueprint: LayerBlueprint, module: nn.Module) -> dict[str, kernel_state.Leaf]:
        """Everything in a module that is made of its parameters, by path."""
        leaves, made = kernel_state.leaves(module), self._made.get(blueprint.name)
        return leaves if made is None else {p: leaf for p, leaf in leaves.items() if p in made}

    def _refresh(self, started: set[str], undo: UndoLog) -> None:
        """Bring what other layers hold of a parameter up to date."""
        for tensor, target, view in self._stale:
            if target in started:
                undo.remember(tensor)
                tensor.copy_(view.into(self._stages[target].memory(self.device)))

    def _maxima(self, blueprint: LayerBlueprint) -> shards.Maxima:
        """What is known of the whole tensors of which this module holds shards."""
        stages = [self._stages[target] for target in blueprint.targets.values()]
        return shards.Maxima([stage for stage in stages if stage.started])

    def _to_be_hidden(self, staged: Mapping[str, Tensor]) -> Iterator[tuple[str, Tensor]]:
        """What only a fingerprint will show of, once it is live."""
        for target, values in staged.items():
            if self._is_packed or target in self.compared:
                yield target, values

    @functools.cached_property
    def _is_packed(self) -> bool:
        """Whether kernels read memory whose bytes cannot be seen."""
        leaves = (kernel_state.leaves(blueprint.module) for blueprint in self.blueprints)
        return any(not isinstance(leaf, Tensor) for found in leaves for leaf in found.values())

    def _note_digest(self, target: str, value: str, undo: UndoLog) -> None:
        undo.remember_how(
            functools.partial(self._digests.__setitem__, target, self._digests[target])
        )
        self._digests[target] = value

    def _settle(self, target: str, undo: UndoLog) -> tuple[Tensor, int]:
        """The checkpoint-format tensor to process, and the bytes it took to put it there.

        Where the live parameter still is the checkpoint's, it takes the staged
        values first and is processed as it lies: a handler that keeps a raw
        pointer to its scales then points at the live scales, for good.
        """
        stage, live = self._stages[target], self._in_place(target)
        if not stage.started:
            return self._standing(target), 0
        staged = stage.memory(self.device)
        if live is None:
            return staged, 0
        if staged.data_ptr() != live.data_ptr():
            undo.remember(live)
            live.copy_(staged)
        return live, live.nbytes

    def _standing(self, target: str) -> Tensor:
        """What the live layer holds of a parameter that was not sent."""
        live = self._in_place(target)
        kept = live if live is not None else self._read_back(target)
        if kept is None:
            raise ReloadError(f"{target} was not sent, and cannot be read back from the engine")
        return kept

    def _in_place(self, target: str) -> Tensor | None:
        """The live tensor that still is this parameter in the checkpoint's own layout."""
        live = self._live(target) if target in self._kept else None
        return (
            live.detach() if live is not None and live.dtype == self._metas[target].dtype else None
        )

    def _read_back(self, target: str) -> Tensor | None:
        """The live value of a parameter in checkpoint format, if its layout still shows it.

        vLLM's CPU kernels keep a bf16 bias widened to float32: that is narrowed back.
        """
        meta, live = self._metas[target], self._live(target)
        if live is None or live.shape != meta.shape or live.stride() != meta.stride():
            return None
        if live.dtype == meta.dtype:
            return live.detach()
        widened = live.dtype == torch.float32 and meta.dtype.is_floating_point
        return live.detach().to(meta.dtype) if widened else None

    def _live(self, target: str) -> Tensor | None:
        for blueprint in self.blueprints:
            for name, own in blueprint.targets.items():
                live = blueprint.module._parameters.get(name)
                if own == target and live is not None:
                    return live
        return None

    def _check_ties(self) -> None:
        """Refuse two parameters that vLLM stores once, arriving with different values."""
        homes: dict[int, list[str]] = defaultdict(list)
        for target, stage in self._stages.items():
            if stage.started and (live := self._in_place(target)) is not None:
                homes[live.data_ptr()].append(target)
        for first, *others in homes.values():
            memory = self._stages[first].memory(self.device)
            for other in others:
                if not torch.equal(memory, self._stages[other].memory(self.device)):
                    raise ReloadError(
                        f"{first} and {other} arrived with different values, but were equal in "
                        "the checkpoint the engine started on, so vLLM stores them once. Start the "
                        "engine with hf_overrides={'tie_word_embeddings': False}, or push them "
                        "equal."
                    )


def _check_made(blueprint: LayerBlueprint, twin: nn.Module) -> frozenset[str]:
    """The paths of what processing makes, if the live attention holds the same, laid out alike."""
    fresh, live = (
        {path: leaf for path, leaf in kernel_state.leaves(one).items() if path not in one._buffers}
        for one in (twin, blueprint.module)
    )
    try:
        kernel_state.check_same_layout(fresh, live, blueprint.name)
    except ReloadError as misfit:
        raise UnsupportedEngine(
            f"{blueprint.name} ({type(blueprint.module).__name__}) keeps weights made from other "
            f"layers', and flashquant cannot make them anew: {misfit}"
        ) from misfit
    return frozenset(fresh)


def targets_of(blueprints: Sequence[LayerBlueprint]) -> set[str]:
    """The parameters of some modules, by their names in the model."""
    return {target for blueprint in blueprints for target in blueprint.targets.values()}
