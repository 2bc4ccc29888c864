"""Layers into which rows can be written where the kernels read them.

Whether a layer is one is not told by the name of its kernel but seen, once for each kind: vLLM
processes a twin that holds random values, and `storages` says what became of every parameter. If
all of them are handed on in their own memory, or are just the codes and scales that a quantizer
of ours makes, then what arrives needs no stage of its own and no processing. Everything else is
staged, and processed by vLLM on a twin.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterator, Mapping
from contextlib import AbstractContextManager

import torch
from torch import Tensor, nn
from vllm.model_executor.layers.quantization.base_config import QuantizeMethodBase

from flashquant.errors import UnsupportedEngine
from flashquant.patches.layers import kernel_state
from flashquant.patches.layers import shard_maxima as shards
from flashquant.patches.layers.blueprint import LayerBlueprint
from flashquant.patches.layers.memory_layout import Quantize, Storage, is_dense, storages

logger = logging.getLogger(__name__)

Kind = tuple[object, ...]


def method_of(module: nn.Module) -> QuantizeMethodBase | None:
    """What vLLM processes this module's weights with, if anything."""
    method = getattr(module, "quant_method", None)
    return method if isinstance(method, QuantizeMethodBase) else None


def kind_of(blueprint: LayerBlueprint) -> Kind:
    """What layers have in common that vLLM processes alike."""
    method = method_of(blueprint.module)
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


class Direct:
    """Finds the live memory behind the parameters of layers, one probe a kind.

    Args:
        quantize: what makes codes and scales of the floats of an online scheme; None where
            vLLM quantizes them in a way that is not ours.
        by_row: whether it makes a scale for each row, `[N, 1]`, or one for the matrix, `[1]`; of
            experts `[E, N, K]`, `[E, N, 1]` or `[E]`.
        context: the surroundings in which vLLM processes layers.
        device: where they live.

    """

    def __init__(
        self,
        quantize: Quantize | None,
        context: Callable[[], AbstractContextManager[object]],
        device: torch.device,
        *,
        by_row: bool = True,
    ) -> None:
        self._by_row = by_row
        self._quantize, self._context, self._device = quantize, context, device
        self._known: dict[Kind, dict[str, Storage]] = {}

    def homes(self, blueprint: LayerBlueprint) -> dict[str, Tensor] | None:
        """Live tensors, laid out as rows arrive, by parameter; None if there is more to it.

        Scales that are made of floats stand beside their codes, as `<parameter>_scale`.

        Raises:
            UnsupportedEngine: something made of one is kept where it could not be renewed.

        """
        if method_of(blueprint.module) is None:
            return None
        kind = kind_of(blueprint)
        if kind not in self._known:
            self._known[kind] = self._probe(blueprint)
            _refuse_hidden(blueprint, self._known[kind])
        leaves = kernel_state.leaves(blueprint.module)
        found: dict[str, Tensor] = {}
        for name, storage in self._known[kind].items():
            meta, target = blueprint.parameters[name], blueprint.targets[name]
            live = [leaf for p in storage.leaves if isinstance(leaf := leaves.get(p), Tensor)]
            if meta is None or not live or len(live) < len(storage.leaves):
                return None
            found |= dict(_laid_out(target, storage, meta, live, by_row=self._by_row))
        return found if found.keys() >= set(blueprint.targets.values()) else None

    def _probe(self, blueprint: LayerBlueprint) -> dict[str, Storage]:
        with self._context():
            values = {
                name: _random(meta, self._device)
                for name, meta in blueprint.parameters.items()
                if meta is not None
            }
            with shards.answered_by(shards.Maxima(())):
                found = storages(blueprint.build(values), values, self._quantize)
        for name, storage in found.items():
            logger.debug(
                "%s.%s is stored as %s %s", blueprint.name, name, storage.kind, storage.reason
            )
        return found


def _refuse_hidden(blueprint: LayerBlueprint, found: Mapping[str, Storage]) -> None:
    for name, storage in found.items():
        if storage.kind == "hidden":
            method = type(method_of(blueprint.module)).__name__
            raise UnsupportedEngine(
                f"{blueprint.name}.{name} ({type(blueprint.module).__name__}, {method}): "
                f"{storage.reason}, so it would go stale when new weights are pushed. Choose "
                "another kernel or scheme, or unset FLASHRL_CONFIG to serve this model "
                "unpatched; and please report the layer."
            )


def _laid_out(
    target: str, storage: Storage, meta: Tensor, live: list[Tensor], *, by_row: bool
) -> Iterator[tuple[str, Tensor]]:
    """The live memory of one parameter as rows arrive in it; nothing, if that cannot be said."""
    if storage.kind == "rows" and meta.is_contiguous() and _is_one(live, meta):
        yield target, live[0].detach().as_strided(meta.shape, meta.stride())
    elif storage.kind == "codes":
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


def _random(meta: Tensor, device: torch.device) -> Tensor:
    """Values among which no two are alike by accident of being zero."""
    made = torch.empty(meta.shape, dtype=meta.dtype, device=device)
    if meta.dtype.is_floating_point and meta.dtype.itemsize > 1:
        return made.uniform_(0.5, 2.0) if meta.dim() < 2 else made.uniform_(-2.0, 2.0)
    made.view(torch.uint8).random_(0, 120)  # of float8, none of which is NaN
    return made
