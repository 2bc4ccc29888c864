"""Parameters that vLLM's processing passes through: they go live by themselves.

A bias is handed to the matmul as it is, or widened to float32; nothing else is made from it.
So it can go live whatever becomes of the weight next to it. A weight is packed or quantized, and
its scales may be read through a pointer that a handler keeps: those belong together.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from torch import Tensor

from flashquant.patches.layers import kernel_state
from flashquant.patches.layers.blueprint import LayerBlueprint
from flashquant.patches.layers.memory_layout import MemoryLayout
from flashquant.patches.layers.probe import Probe
from flashquant.patches.layers.readiness import belong_together


def passed_through(
    blueprints: Sequence[LayerBlueprint], probe: Probe
) -> dict[str, tuple[Tensor, ...]]:
    """The parameters of some modules that go live alone, and the live tensors that are them.

    Scales never do, though a kernel may read them as they come: they belong to their codes.
    Nor does anything that an attention makes weights of, whatever its own module does with it.
    The only parameter of processed modules waits for no other, and is processed all the same.
    """
    targets = {target for blueprint in blueprints for target in blueprint.targets.values()}
    processed = any(blueprint.method is not None for blueprint in blueprints)
    if (len(targets) == 1 and processed) or any(blueprint.sources for blueprint in blueprints):
        return {}
    homes: dict[str, list[Tensor]] = {target: [] for target in targets}
    bound = {one for one in targets if any(belong_together(one, other) for other in targets)}
    for blueprint in blueprints:
        copies, leaves = _copies(blueprint, probe), kernel_state.leaves(blueprint.module)
        for name, target in blueprint.targets.items():
            found = [leaves[path] for path in copies[name]]
            homes[target].extend(leaf for leaf in found if isinstance(leaf, Tensor))
            bound |= set() if found else {target}
    return {target: tuple(found) for target, found in homes.items() if target not in bound}


def _copies(blueprint: LayerBlueprint, probe: Probe) -> Mapping[str, tuple[str, ...]]:
    """The leaves that are each parameter, in whatever dtype; none where more is made of it."""
    if blueprint.method is None:
        return {name: (name,) for name in blueprint.targets}
    layouts = probe.layouts(blueprint)
    return {
        name: layouts[name].copies or _itself(blueprint, name, layouts[name])
        for name in blueprint.targets
    }


def _itself(blueprint: LayerBlueprint, name: str, layout: MemoryLayout) -> tuple[str, ...]:
    """The one leaf that is a parameter in its own memory, whatever processing has tried with it."""
    leaf, meta = blueprint.module._parameters.get(name), blueprint.parameters[name]
    if layout.kind != "rows" or layout.leaves != (name,) or leaf is None or meta is None:
        return ()
    return (name,) if (leaf.shape, leaf.stride()) == (meta.shape, meta.stride()) else ()
