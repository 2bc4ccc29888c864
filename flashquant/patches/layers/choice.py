"""Which kind of live layer a group of modules becomes, by what the probe has seen of them."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from collections.abc import Set as AbstractSet
from dataclasses import dataclass

import torch
from torch import Tensor

from flashquant.patches.layers.aliases import Alias
from flashquant.patches.layers.base import LiveLayer
from flashquant.patches.layers.blueprint import Context, LayerBlueprint
from flashquant.patches.layers.homes import homes_of
from flashquant.patches.layers.in_place import InPlaceLayer
from flashquant.patches.layers.live_parameters import LiveParameters
from flashquant.patches.layers.pass_through import passed_through
from flashquant.patches.layers.per_tensor import PerTensorLayer
from flashquant.patches.layers.probe import Probe
from flashquant.patches.layers.processed import ProcessedLayer
from flashquant.schemes import Quantize


@dataclass(frozen=True)
class Quantizer:
    """How an online scheme quantizes the floats of a layer, where flashquant makes the same bits.

    Attributes:
        quantize: makes codes and scales of `[N, K]`, or of experts `[E, N, K]` at once.
        per_tensor: one scale a matrix, so that codes need all of it; else one for each row.

    """

    quantize: Quantize
    per_tensor: bool


class LayerChoice:
    """Makes the live layers of one model that has been processed.

    Args:
        context: the surroundings in which vLLM processes modules.
        device: where they live.
        loaded: the fingerprint of each parameter, taken just before processing.
        quantizer: of an online scheme; None where vLLM has to quantize, or nothing does.
        shares_scales: whether scales span the shards of other workers.
        aliases: windows of parameters that other layers hold as they were loaded.
        compared: parameters that have to equal what comes under their other names.

    """

    def __init__(
        self,
        context: Context,
        device: torch.device,
        loaded: Mapping[str, str],
        quantizer: Quantizer | None,
        *,
        shares_scales: bool,
        aliases: Sequence[Alias],
        compared: AbstractSet[str],
    ) -> None:
        self._context, self._device, self._loaded = context, device, loaded
        self._quantizer, self._shares_scales = quantizer, shares_scales
        self._aliases, self._compared = aliases, compared
        self._probe = Probe(context, device, None if quantizer is None else quantizer.quantize)

    def layer(self, group: Sequence[LayerBlueprint]) -> LiveLayer:
        """The live layer of modules that share their parameters, or of a single module.

        Raises:
            UnsupportedEngine: its weights could not be made anew when others are pushed.

        """
        for blueprint in group:
            self._probe.layouts(blueprint)  # each is looked at, whatever becomes of it
        homes = self._homes(group)
        if homes is None:
            return self._processed(group)
        if self._quantizer is not None and self._is_quantized_whole(group[0], homes):
            return PerTensorLayer(group[0], homes, self._quantizer.quantize)
        return InPlaceLayer(group[0], homes)

    def _homes(self, group: Sequence[LayerBlueprint]) -> dict[str, Tensor] | None:
        """Live memory into which rows can be written, if all of a group has some."""
        if len(group) > 1:
            return None
        (blueprint,) = group
        if any(alias.target in blueprint.targets.values() for alias in self._aliases):
            return None
        if blueprint.method is None and not blueprint.sources:
            return self._as_loaded(blueprint)
        by_row = self._quantizer is None or not self._quantizer.per_tensor
        homes = homes_of(blueprint, self._probe.layouts(blueprint), by_row=by_row)
        if homes is not None and self._shares_scales and _makes_codes_of_experts(blueprint, homes):
            return None  # the maxima of whole rows are known to vLLM's own processing only
        return homes

    def _as_loaded(self, blueprint: LayerBlueprint) -> dict[str, Tensor] | None:
        """All live memory of a module without a method, as a norm; None if any of it was changed,
        for a model may do so by itself, or has to be compared with what comes by another name."""
        if not self._compared.isdisjoint(blueprint.targets.values()):
            return None
        live = LiveParameters((blueprint,), blueprint.forms, self._loaded)
        homes = {target: live.in_place(target) for target in blueprint.forms}
        found = {t: home for t, home in homes.items() if home is not None and home.is_contiguous()}
        return found if found and len(found) == len(homes) else None

    def _is_quantized_whole(self, blueprint: LayerBlueprint, homes: Mapping[str, Tensor]) -> bool:
        per_tensor = self._quantizer is not None and self._quantizer.per_tensor
        return (per_tensor and blueprint.method is not None) or _makes_codes_of_experts(
            blueprint, homes
        )

    def _processed(self, group: Sequence[LayerBlueprint]) -> ProcessedLayer:
        layer = ProcessedLayer(
            group,
            self._loaded,
            passed_through(group, self._probe),
            self._context,
            self._device,
            self._aliases,
            self._compared,
            self._probe.changed(group),
        )
        layer.rehearse()
        return layer


def _makes_codes_of_experts(blueprint: LayerBlueprint, homes: Mapping[str, Tensor]) -> bool:
    """Whether stacked floats `[E, N, K]` are stored as codes, which are made of all of them."""
    return any(
        form.dim() == 3 and homes[target].dtype != form.dtype
        for target, form in blueprint.forms.items()
    )
