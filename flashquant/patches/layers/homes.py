"""Live memory into which rows of a module can be written, where its kernels read them.

There is some if the probe has seen that processing hands every parameter on in its own memory, or
just makes the codes and scales of it that flashquant's quantizer makes. Then what arrives needs no
processing, and no stage in the trainer's precision.
"""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor

from flashquant.patches.layers import kernel_state
from flashquant.patches.layers.blueprint import LayerBlueprint
from flashquant.patches.layers.memory_layout import MemoryLayout, is_dense
from flashquant.patches.layers.probe import Layouts


def homes_of(
    blueprint: LayerBlueprint, layouts: Layouts, *, by_row: bool
) -> dict[str, Tensor] | None:
    """Live tensors, laid out as rows arrive, by parameter; None if there is more to it.

    Scales that are made of floats are listed beside their codes, as `<parameter>_scale`.

    Args:
        blueprint: the module.
        layouts: what the probe has seen of its kind.
        by_row: whether codes have a scale for each row, `[N, 1]`, or one for the matrix, `[1]`;
            of experts `[E, N, K]`, `[E, N, 1]` or `[E]`.

    """
    leaves = kernel_state.leaves(blueprint.module)
    found: dict[str, Tensor] = {}
    for name, layout in layouts.items():
        meta, target = blueprint.parameters[name], blueprint.targets[name]
        live = [leaf for p in layout.leaves if isinstance(leaf := leaves.get(p), Tensor)]
        if meta is None or not live or len(live) < len(layout.leaves):
            return None
        found |= dict(_laid_out(target, layout, meta, live, by_row=by_row))
    return found if found and found.keys() >= set(blueprint.targets.values()) else None


def _laid_out(
    target: str, layout: MemoryLayout, meta: Tensor, live: list[Tensor], *, by_row: bool
) -> Iterator[tuple[str, Tensor]]:
    """The live memory of one parameter as rows arrive in it; nothing, if that cannot be said."""
    if layout.kind == "rows" and meta.is_contiguous() and _is_one(live, meta):
        yield target, live[0].detach().as_strided(meta.shape, meta.stride())
    elif layout.kind == "codes":
        codes, scales = live
        form = torch.Size((*meta.shape[:-1], 1) if by_row else (*meta.shape[:-2],) or (1,))
        if is_dense(codes) and is_dense(scales) and scales.numel() == form.numel():
            yield target, _contiguous(codes, meta.shape)
            yield f"{target}_scale", _contiguous(scales, form)


def _contiguous(live: Tensor, shape: torch.Size) -> Tensor:
    """The memory behind a dense leaf, in the order of a contiguous tensor of this shape."""
    return live.detach().as_strided((live.numel(),), (1,)).view(shape)


def _is_one(live: list[Tensor], meta: Tensor) -> bool:
    """Whether all of these leaves are the same memory, and it is as large as the parameter."""
    first = live[0]
    return all(
        leaf.data_ptr() == first.data_ptr()
        and is_dense(leaf)
        and (leaf.numel(), leaf.dtype) == (meta.numel(), meta.dtype)
        for leaf in live
    )
