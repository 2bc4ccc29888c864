"""Layers that stay in bf16: what an entry keeps is asked of vLLM, and looked for in the engine.

    keep: ["*.down_proj"]  ->  modules of the checkpoint  ->  vLLM's own argument `ignore`
                                                          ->  where they landed is not quantized

Names are of the checkpoint, and vLLM matches those of its modules. It maps the one to the other
for compressed-tensors only, so each is asked for by its name, which is mapped (here, for the online
schemes), and by an expression that holds below any prefix. Whether that was enough is not
believed: when the checkpoint is loaded, the write plan tells which layer every name landed in.
"""

from __future__ import annotations

import dataclasses
import os
import re
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping
from collections.abc import Set as AbstractSet
from pathlib import Path
from typing import Any

from torch import nn
from vllm.config import VllmConfig
from vllm.model_executor.layers.quantization.base_config import QuantizeMethodBase
from vllm.model_executor.layers.quantization.online.base import OnlineQuantizationConfig
from vllm.model_executor.layers.vocab_parallel_embedding import UnquantizedEmbeddingMethod
from vllm.model_executor.model_loader.utils import get_model_architecture

from flashquant.config.keep import kept_modules, modules_of, nearest, with_parents
from flashquant.config.locate import locate_in_model
from flashquant.config.schema import RolloutConfig
from flashquant.config.schemes import SCHEMES
from flashquant.errors import ConfigError, ReloadError
from flashquant.patches.seams.in_bf16 import QUANTIZABLE
from flashquant.plan import stored_names
from flashquant.profiles import load_names

_IN_BF16 = (*QUANTIZABLE, UnquantizedEmbeddingMethod)
# On the Hub: the index, or the one file of a model that has none.
_WITH_NAMES = ("model.safetensors.index.json", "model.safetensors")


def keep_in_bf16(
    args: Any, config: RolloutConfig, checkpoint: Mapping[str, Any]
) -> tuple[str, ...]:
    """Write the modules that an entry keeps into vLLM's engine arguments.

    FlashRL's profile of an fp8 scheme is a list of what is quantized; all others are kept.

    Args:
        args: vLLM's `EngineArgs`, changed in place.
        config: the entry.
        checkpoint: the model's configuration.

    Returns:
        Their names in the checkpoint.

    Raises:
        ConfigError: one of them matches nothing, is quantized already, or cannot be looked for.
        ProfileError: the profile is no list of names.

    """
    listed = config.profile if SCHEMES[config.scheme].lists_layers else None
    if not config.keep and listed is None:
        return ()
    names = names_in(args.model, args.revision)
    kept = kept_modules(config.keep, names, depth_of(checkpoint))
    if listed is not None:
        kept = tuple(sorted({*kept, *_unlisted(listed, names)}))
    _refuse_quantized(kept, names, args.model)
    if checkpoint.get("quantization_config") is None:
        _ignore_also(args, patterns(frozenset(kept), modules_of(names)))
    return kept


def name_as_vllm(vllm_config: VllmConfig, kept: AbstractSet[str]) -> None:
    """Tell vLLM's online schemes what its own names of kept modules are, before any is created.

    Args:
        vllm_config: of the model that is about to be created; its quantization is changed in place.
        kept: modules of the checkpoint.

    """
    quantization = vllm_config.quant_config
    if kept and isinstance(quantization, OnlineQuantizationConfig):
        model_class, _ = get_model_architecture(vllm_config.model_config)
        if (mapper := getattr(model_class, "hf_to_vllm_mapper", None)) is not None:
            # What else it does since 0.32 is to fuse q, k and v; a part is not to keep the whole.
            renames = getattr(mapper, "get_rename_mapper", lambda: mapper)()
            theirs = renames.apply_list(sorted(kept))
            quantization.ignored_layers = [*quantization.ignored_layers, *theirs]


def check_kept(
    model: nn.Module, kept: AbstractSet[str], landed: Mapping[str, tuple[str, ...]]
) -> None:
    """Hold the engine to what was asked of it.

    Args:
        model: vLLM's, loaded.
        kept: modules of the checkpoint.
        landed: the parameters in which each tensor of the checkpoint landed, by its name.

    Raises:
        ConfigError: one is quantized all the same, or shares its layer with one that is not kept.

    """
    layers: dict[str, dict[str, None]] = {}
    for name, targets in landed.items():
        for target in targets:
            modules = layers.setdefault(target.rpartition(".")[0], {})
            modules.update(dict.fromkeys(modules_of([name])))
    for path, modules in layers.items():
        mine = [module for module in modules if module in kept]
        method = getattr(model.get_submodule(path), "quant_method", None)
        if not mine or not isinstance(method, QuantizeMethodBase):
            continue
        if not isinstance(method, _IN_BF16):
            raise ConfigError(
                f"keep: vLLM quantizes {mine[0]} all the same, in {path} "
                f"({type(method).__name__}). Keep all that is computed in this layer, or leave "
                f"{mine[0]} out."
            )
        if isinstance(method, QUANTIZABLE):
            _refuse_parts(path, mine, [module for module in modules if module not in kept])


def _refuse_parts(path: str, kept: list[str], others: list[str]) -> None:
    if others:
        raise ConfigError(
            f"keep: {kept[0]} stays in bf16 and {others[0]} does not, but vLLM computes both in "
            f"{path}. Keep all of its parts, or none."
        )


def names_in(model: str, revision: str | None, key: str = "keep") -> tuple[str, ...]:
    """The names of all tensors in the checkpoint of a model; the key of an entry is for errors.

    Raises:
        ConfigError: it has no safetensors.

    """
    try:
        if os.path.isdir(model):
            return stored_names(Path(model))
        place = f"{model}@{revision}" if revision else model
        found = (locate_in_model(place, name) for name in _WITH_NAMES)
        located = next((file for file in found if file is not None), None)
        if located is not None:
            return stored_names(located.path)
    except ReloadError as refusal:
        raise ConfigError(f"{key} names modules of the checkpoint, and {refusal}") from refusal
    raise ConfigError(
        f"{key} names modules of the checkpoint, and {model} has no safetensors to look for them "
        f"in. Serve a checkpoint in safetensors, or leave {key} out."
    )


def _unlisted(profile: str, names: tuple[str, ...]) -> Iterator[str]:
    """The modules of a checkpoint of which a FlashRL profile lists no weight.

    Raises:
        ConfigError: it lists one that the checkpoint does not have.

    """
    listed, modules = load_names(profile), modules_of(names)
    if foreign := next((name for name in listed if name not in names), None):
        raise ConfigError(
            f"the profile {profile} lists {foreign}, which the checkpoint does not have; "
            f"{nearest(modules_of([foreign])[0], modules)}. Use the profile of this model."
        )
    quantized = set(modules_of(listed))
    return (module for module in modules if module not in quantized)


def depth_of(checkpoint: Mapping[str, Any]) -> int | None:
    """How many blocks the language model has, where the configuration says so."""
    own = checkpoint.get("text_config")
    depth = (own if isinstance(own, Mapping) else checkpoint).get("num_hidden_layers")
    return depth if isinstance(depth, int) else None


def _refuse_quantized(kept: Iterable[str], names: Iterable[str], model: str) -> None:
    """What a checkpoint holds as codes has no bf16 to stay in."""
    codes = set(modules_of(name for name in names if name.endswith("_scale")))
    if wrong := next((module for module in kept if module in codes), None):
        raise ConfigError(
            f"keep: {wrong} is quantized already in {model}. Serve the bf16 checkpoint, or leave "
            "it out of keep (and in the list of a FlashRL profile)."
        )


def _ignore_also(args: Any, patterns: list[str]) -> None:
    """Add to what vLLM's own argument leaves in bf16."""
    theirs = args.quantization_config
    if theirs is None or isinstance(theirs, Mapping):
        before = (theirs or {}).get("ignore") or ()
        args.quantization_config = {**(theirs or {}), "ignore": [*before, *patterns]}
    else:
        args.quantization_config = dataclasses.replace(theirs, ignore=[*theirs.ignore, *patterns])


def patterns(kept: AbstractSet[str], modules: Iterable[str]) -> list[str]:
    """How vLLM is told of modules: each by name, the largest that are whole by expression, too."""
    there = Counter(parent for module in modules for parent in with_parents(module))
    mine = Counter(parent for module in kept for parent in with_parents(module))
    whole = {module for module, count in mine.items() if count == there[module]}
    largest = sorted(m for m in whole if m.rpartition(".")[0] not in whole)
    return [*sorted(kept), *(rf"re:(?:.*\.)?{re.escape(m)}(?:\..*)?$" for m in largest)]
