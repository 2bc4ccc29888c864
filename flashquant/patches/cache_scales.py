"""The scales of a KV cache in fp8: a number for the keys of each layer, and one for its values.

A key is cached as e4m3(key / k_scale), and read as what is cached times k_scale. vLLM takes scales
from the checkpoint, or 1.0, and keeps each three times: in a tensor on the device, in one on the
host, and as a number that kernels are called with. Attentions of FlashInfer and Tokenspeed keep a
product of such numbers, too, from their first forward pass on.
"""

from __future__ import annotations

import difflib
import functools
import math
from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor, nn
from vllm.model_executor.models.utils import PPMissingLayer

from flashquant.errors import ConfigError, MisfitTensor, ReloadError, UnknownWeight
from flashquant.patches.layers import is_deferred_attention_layer
from flashquant.update import KVScales, UndoLog

_SIDES = ("_k_scale", "_v_scale")
_SUFFIX = ".attn"  # vLLM's own module in that of the checkpoint


class CacheScales:
    """Those of one model; empty where its cache holds what the model computes.

    They are also held on the host: an engine that has slept at level 2 may have lost them.

    Args:
        model: vLLM's.
        captured: whether numbers that kernels are called with are captured in CUDA graphs.

    """

    def __init__(self, model: nn.Module, *, captured: bool) -> None:
        self._captured, self._model = captured, model
        self._held: dict[str, tuple[Tensor, Tensor]] = {}  # on the host, of every layer
        self._unmade: dict[str, list[tuple[object, str]]] = {}  # what the first pass may make
        self._layers: dict[str, Any] = {
            name.removesuffix(_SUFFIX): module
            for name, module in model.named_modules()
            if is_deferred_attention_layer(module) and _caches_in_fp8(module)
        }

    def open(self, scales: KVScales, *, loaded: bool = True) -> None:
        """The model is processed: it starts with these, and else with those that vLLM has set.

        Args:
            scales: by attention layer.
            loaded: from a checkpoint. Dummy weights are random numbers, and so are their scales.

        Raises:
            ConfigError: they are not for this model.

        """
        for module in () if loaded else self._model.modules():
            if is_deferred_attention_layer(module):
                _set_ones(module)
        for name, layer in self._layers.items():
            keys, values = (getattr(layer, side).detach().cpu().clone() for side in _SIDES)
            self._held[name] = keys, values
            self._unmade[name] = list(_not_made_yet(layer))
        if scales:
            try:
                self._check_names(scales)
            except ReloadError as misfit:
                raise ConfigError(
                    f"{misfit} They are those that the entry names under `kv_scales`; make them "
                    "of this model with `flashquant profile make --kv`."
                ) from None
            self.set(scales, UndoLog(keep=False))

    def contents(self) -> Iterator[tuple[str, Tensor]]:
        """Every scale, by the name of its layer."""
        for name, layer in self._layers.items():
            for side in _SIDES:
                yield f"{name}.{side[1:]}", getattr(layer, side).detach()

    def check(self, scales: KVScales) -> None:
        """Refuse scales before anything is touched.

        Raises:
            MisfitTensor: one is not finite and positive, or not one number a layer.
            UnknownWeight: there is no such layer.
            ReloadError: the cache is not in fp8, or the numbers are in CUDA graphs.

        """
        if not self._layers:
            raise ReloadError(
                "kv_scales are for a KV cache in fp8, and this engine caches what the model "
                "computes. Write `kv_cache: fp8` in the entry, or leave kv_scales out."
            )
        if self._captured:
            raise ReloadError(
                "kv_scales are numbers that CUDA graphs have captured, which would go on with the "
                "old ones. Start the engine with enforce_eager=True, or leave kv_scales out."
            )
        for name, pair in scales.items():
            _check_pair(name, pair)
        self._check_names(scales)

    def _check_names(self, scales: KVScales) -> None:
        for name in scales:
            if (layer := self._layers.get(name.removesuffix(_SUFFIX))) is None:
                if not self._is_of_another_stage(name):
                    raise UnknownWeight(
                        f"kv_scales: no attention layer is {name!r}{self._near(name)}."
                    )
            elif any(getattr(layer, side).numel() != 1 for side in _SIDES):
                raise MisfitTensor(
                    f"kv_scales of {name} are a number for each head in this checkpoint; one a "
                    "layer cannot take their place. Leave it out."
                )

    def set(self, scales: KVScales, undo: UndoLog) -> None:
        """Write scales that have been checked; an undo log keeps what was there."""
        for name, pair in scales.items():
            name = name.removesuffix(_SUFFIX)
            if (layer := self._layers.get(name)) is None:
                continue  # another pipeline stage has it
            undo.remember_how(functools.partial(self._held.__setitem__, name, self._held[name]))
            keys, values = (torch.tensor(value, dtype=torch.float32) for value in pair)
            self._held[name] = keys, values
            for side in _SIDES:
                for tensor in _tensors(layer, side):
                    undo.remember(tensor)
                number = f"{side}_float"
                undo.remember_how(functools.partial(setattr, layer, number, getattr(layer, number)))
            self._write(name)

    def restore(self) -> None:
        """Write those that were set last once more, where the engine may have lost them."""
        for name in self._held:
            self._write(name)

    def _write(self, name: str) -> None:
        layer = self._layers[name]
        for side, scale in zip(_SIDES, self._held[name], strict=True):
            for tensor in _tensors(layer, side):
                if scale.numel() == tensor.numel():  # shapes differ: [] and [1]
                    tensor.copy_(scale.view_as(tensor))
            if scale.numel() == 1:
                setattr(layer, f"{side}_float", scale.item())
        for holder, attribute in self._unmade[name]:
            if isinstance(getattr(holder, attribute, None), float):
                setattr(holder, attribute, None)  # the next pass makes it anew

    def _is_of_another_stage(self, name: str) -> bool:
        """Whether a module that has this layer is only served by another pipeline rank."""
        parts = name.split(".")
        above = {".".join(parts[:count]) for count in range(1, len(parts) + 1)}
        return any(
            isinstance(module, PPMissingLayer) and stage in above
            for stage, module in self._model.named_modules()
        )

    def _near(self, name: str) -> str:
        near = difflib.get_close_matches(name, self._layers, n=1, cutoff=0.3)
        return f"; did you mean {near[0]!r}?" if near else ""


def _tensors(layer: Any, side: str) -> list[Tensor]:
    """On the device and, in most versions of vLLM, on the host."""
    places = (getattr(layer, side), getattr(layer, f"{side}_cpu", None))
    return [tensor.detach() for tensor in places if isinstance(tensor, Tensor)]


def _set_ones(layer: Any) -> None:
    """What vLLM serves a checkpoint by that holds no scales."""
    for side in (*_SIDES, "_q_scale", "_prob_scale"):
        if isinstance(getattr(layer, side, None), Tensor):
            for tensor in _tensors(layer, side):
                tensor.fill_(1.0)
            setattr(layer, f"{side}_float", 1.0)


def _not_made_yet(layer: Any) -> Iterator[tuple[object, str]]:
    """The attributes of an attention and of its implementation that hold nothing, before its first
    forward pass."""
    for holder in (layer, getattr(layer, "impl", None)):
        for attribute, value in getattr(holder, "__dict__", {}).items():
            if value is None:
                yield holder, attribute


def _caches_in_fp8(layer: Any) -> bool:
    """With scales that stay as they are; others are computed for every token."""
    dtype = str(getattr(layer, "kv_cache_dtype", "auto"))
    fixed = dtype.startswith("fp8") and not dtype.endswith("per_token_head")
    return fixed and all(isinstance(getattr(layer, side, None), Tensor) for side in _SIDES)


def _check_pair(name: str, pair: object) -> None:
    values = pair if isinstance(pair, tuple | list) else ()
    numbers = [float(value) for value in values if isinstance(value, int | float)]
    # As float32: a scale is stored so.
    fits = [n for n in numbers if math.isfinite(n) and torch.tensor(n, dtype=torch.float32) > 0]
    if len(fits) != 2 or len(values) != 2 or any(n > torch.finfo(torch.float32).max for n in fits):
        raise MisfitTensor(
            f"kv_scales of {name} are {pair!r}; write two numbers, of keys and of values, finite "
            "and above 0. The engine still serves the weights and scales it had."
        )
