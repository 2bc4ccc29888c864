"""What vLLM's processing makes of each kind of module: one look for everything that depends on it.

Kernels are not known by name. Once for each kind, a twin that holds random values is processed
under a watcher (`memory_layout`, `provenance`), before the engine serves: later, its cache may have
taken the memory that a twin needs. What is seen decides

    whether the module can be served   something made of a parameter that is kept out of sight
                                       would go stale: refused by name
    where its rows can be written      `homes`
    what goes live alone               `pass_through`
    what is live as it was loaded      `changed`: all other parameters, if their bytes say so, too
"""

from __future__ import annotations

import logging
from collections.abc import Iterable, Mapping

import torch
from torch import Tensor

from flashquant.errors import UnsupportedEngine
from flashquant.patches.layers.blueprint import Context, LayerBlueprint
from flashquant.patches.layers.memory_layout import MemoryLayout, Quantize, memory_layouts
from flashquant.patches.layers.tensor_parallel_maxima import Maxima, answered_by

logger = logging.getLogger(__name__)

Kind = tuple[object, ...]
Layouts = Mapping[str, MemoryLayout]


class Probe:
    """Processes a twin of each kind of module once, and keeps what it shows.

    Args:
        context: the surroundings in which vLLM processes modules.
        device: where they live.
        quantize: what makes codes and scales of the floats of an online scheme; None where
            vLLM makes others than flashquant.

    """

    def __init__(
        self, context: Context, device: torch.device, quantize: Quantize | None = None
    ) -> None:
        self._context, self._device, self._quantize = context, device, quantize
        self._known: dict[Kind, Layouts] = {}

    def layouts(self, blueprint: LayerBlueprint) -> Layouts:
        """What becomes of each parameter's memory; nothing of a module without a method of its own.

        An attention has a method for its cache; its weights are made of other modules'.

        Raises:
            UnsupportedEngine: something made of one is kept where it could not be renewed.

        """
        if blueprint.method is None or blueprint.sources:
            return {}
        kind = kind_of(blueprint)
        if kind not in self._known:
            self._known[kind] = found = self._process(blueprint)
            _refuse_hidden(blueprint, found)
        return self._known[kind]

    def changed(self, blueprints: Iterable[LayerBlueprint]) -> frozenset[str]:
        """The parameters that processing leaves nowhere as they were loaded.

        What is live may not tell: zeros that were moved about are zeros.
        """
        every, stay = set[str](), set[str]()
        for blueprint in blueprints:
            layouts = self.layouts(blueprint)
            every.update(blueprint.targets.values())
            stay.update(
                target
                for name, target in blueprint.targets.items()
                if name not in layouts or layouts[name].stays
            )
        return frozenset(every - stay)

    def _process(self, blueprint: LayerBlueprint) -> Layouts:
        with self._context():
            values = {
                name: _random(meta, self._device)
                for name, meta in blueprint.parameters.items()
                if meta is not None
            }
            with answered_by(Maxima(())):
                found = memory_layouts(blueprint.build(values), values, self._quantize)
        for name, layout in found.items():
            logger.debug(
                "%s.%s is stored as %s %s", blueprint.name, name, layout.kind, layout.reason
            )
        return found


def kind_of(blueprint: LayerBlueprint) -> Kind:
    """What modules have in common that vLLM processes alike."""
    method = blueprint.method
    inner = () if method is None else (type(v) for v in vars(method).values())
    return (
        type(blueprint.module),
        type(method),
        *(cls for cls in inner if hasattr(cls, "process_weights_after_loading")),
        *(
            (name, meta.shape, meta.dtype)
            for name, meta in blueprint.parameters.items()
            if meta is not None
        ),
    )


def _refuse_hidden(blueprint: LayerBlueprint, found: Layouts) -> None:
    for name, layout in found.items():
        if layout.kind == "hidden":
            raise UnsupportedEngine(
                f"{blueprint.name}.{name} ({type(blueprint.module).__name__}, "
                f"{type(blueprint.method).__name__}): {layout.reason}, so it would go stale when "
                "new weights are pushed. Choose another kernel or scheme, or unset FLASHRL_CONFIG "
                "to serve this model unpatched; and please report the layer."
            )


def _random(meta: Tensor, device: torch.device) -> Tensor:
    """Values among which no two are alike by accident of being zero."""
    made = torch.empty(meta.shape, dtype=meta.dtype, device=device)
    if meta.dtype.is_floating_point and meta.dtype.itemsize > 1:
        return made.uniform_(0.5, 2.0) if meta.dim() < 2 else made.uniform_(-2.0, 2.0)
    made.view(torch.uint8).random_(0, 120)  # of float8, none of which is NaN
    return made
