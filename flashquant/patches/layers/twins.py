"""vLLM's own processing of one layer, on a twin of each of its modules.

A twin is built from the module's blueprint and the values that are to go live. vLLM's
processing runs on it, and what it then holds is put beside what the live module holds: a `Carry`.
"""

from __future__ import annotations

from collections.abc import Generator, Iterator, Mapping, Sequence
from typing import Any, cast

import torch
from torch import Tensor, nn

from flashquant.errors import ReloadError, UnsupportedEngine
from flashquant.patches.layers import kernel_state
from flashquant.patches.layers.blueprint import Context, LayerBlueprint
from flashquant.patches.layers.kernel_state import Carry, Leaf
from flashquant.patches.layers.tensor_parallel_maxima import Maxima, answered_by
from flashquant.update import Stage

Values = Mapping[str, Tensor]
Stages = Mapping[str, Stage]


class Twins:
    """Makes and processes twins of the modules of one layer.

    Args:
        blueprints: the modules.
        context: the surroundings in which vLLM processes layers.

    """

    def __init__(self, blueprints: Sequence[LayerBlueprint], context: Context) -> None:
        self._blueprints, self._context = blueprints, context
        self._has_attention = any(blueprint.sources for blueprint in blueprints)
        # An attention may want to read the modules that hold nothing of their own.
        self._echoes = frozenset() if self._has_attention else frozenset(echoes(blueprints))
        # Of a deferred attention: what its processing makes. Cache scales and whatever its
        # kernels allocate while they run are not.
        self._made: dict[str, frozenset[str]] = {}

    def rehearse(self, values: Values, stages: Stages) -> None:
        """Make what an attention derives from this layer once, before the engine serves.

        Later, its cache may have taken the memory that a twin needs.

        Args:
            values: anything of the form of the layer's parameters.
            stages: of the parameters, in which nothing has arrived.

        Raises:
            UnsupportedEngine: it comes out otherwise than it lies in the live model.

        """
        with self._context():
            for blueprint, twin in list(self._twins(values, stages)):
                if blueprint.sources:
                    self._made[blueprint.name] = _check_made(blueprint, twin)
                kernel_state.take_apart(twin)

    def processed(self, values: Values, stages: Stages) -> Generator[Carry, None, None]:
        """What vLLM's processing makes of values, beside what is live, module by module.

        One module at a time, so that no more than one is held, unless one reads another.
        Close it if you end early: it holds what vLLM has set for the whole process.

        Args:
            values: of every parameter of the layer, in checkpoint format.
            stages: of the parameters; they know the maxima of the tensors that arrived.

        """
        with self._context():
            twins = self._twins(values, stages)
            if self._has_attention:
                twins = iter(list(twins))
            for blueprint, twin in twins:
                carry = Carry()
                fresh, live = (self.leaves(blueprint, one) for one in (twin, blueprint.module))
                carry.add(fresh, live, blueprint.name)
                kernel_state.take_apart(twin)
                yield carry
                del carry, fresh, live

    def leaves(self, blueprint: LayerBlueprint, module: nn.Module) -> dict[str, Leaf]:
        """Everything in a module, live or a twin, that is made of its parameters, by path."""
        leaves, made = kernel_state.leaves(module), self._made.get(blueprint.name)
        return leaves if made is None else {p: leaf for p, leaf in leaves.items() if p in made}

    def tensors(self) -> Iterator[tuple[str, Tensor]]:
        """The same of all live modules, by full name; a handle shows its pointer's tensor."""
        for blueprint in self._blueprints:
            made = self._made.get(blueprint.name)
            for path, tensor in kernel_state.tensors(blueprint.module):
                if made is None or path in made:
                    yield f"{blueprint.name}.{path}", tensor

    def _twins(self, values: Values, stages: Stages) -> Iterator[tuple[LayerBlueprint, nn.Module]]:
        """Every module of the layer, built anew and processed in vLLM's own order."""
        instead: dict[int, object] = {}
        for blueprint in self._blueprints:
            if blueprint.name in self._echoes:
                continue
            if blueprint.method is not None and not blueprint.sources:
                own = {name: values[target] for name, target in blueprint.targets.items()}
                twin = instead[id(blueprint.module)] = blueprint.build(own)
                with answered_by(_maxima(blueprint, stages)):
                    cast(Any, twin).quant_method.process_weights_after_loading(twin)
                yield blueprint, twin
        for blueprint in self._blueprints:
            if blueprint.sources:  # an attention comes last, and reads the others
                handed = {key: values[target] for key, target in blueprint.sources.items()}
                twin = blueprint.build({}, {**handed, **instead})
                cast(Any, twin).process_weights_after_loading(torch.get_default_dtype())
                yield blueprint, twin


def echoes(blueprints: Sequence[LayerBlueprint]) -> Iterator[str]:
    """The modules that hold nothing but what those before them hold, as a tied head may.

    What goes into those has gone into these.
    """
    held = set[int]()
    for blueprint in blueprints:
        own = {id(leaf) for leaf in kernel_state.leaves(blueprint.module).values()}
        if own <= held:
            yield blueprint.name
        held |= own


def _maxima(blueprint: LayerBlueprint, stages: Stages) -> Maxima:
    """What is known of the whole tensors of which this module holds shards."""
    own = [stages[target] for target in blueprint.targets.values()]
    return Maxima([stage for stage in own if stage.started])


def _check_made(blueprint: LayerBlueprint, twin: nn.Module) -> frozenset[str]:
    """The paths of what processing makes, if the live attention holds the same, laid out alike."""
    both = (twin, blueprint.module)
    # Cache scales among them, which the live one may hold as parameters (vLLM before 0.32).
    buffers = {path for one in both for path in one._buffers}
    fresh, live = (
        {path: leaf for path, leaf in kernel_state.leaves(one).items() if path not in buffers}
        for one in both
    )
    try:
        kernel_state.check_same_layout(fresh, live, blueprint.name)
    except ReloadError as misfit:
        raise UnsupportedEngine(
            f"{blueprint.name} ({type(blueprint.module).__name__}) keeps weights made from other "
            f"layers', and flashquant cannot make them anew: {misfit}"
        ) from misfit
    return frozenset(fresh)
