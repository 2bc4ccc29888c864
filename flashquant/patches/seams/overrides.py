"""Layers in another scheme than the rest: asked of vLLM, and looked for in the engine.

    overrides: [{match: "*.down_proj", fn: fp8_channel}]
        ->  modules of the checkpoint  ->  a group of compressed-tensors' config, with their names
                                       ->  where they landed has the numbers of that group

vLLM computes several modules as one layer, and gives a layer that is named in part the scheme of
the rest, without a word. So whatever it did is looked for as soon as the model is there.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any

from torch import nn
from vllm.config import VllmConfig
from vllm.model_executor.layers.quantization.base_config import QuantizeMethodBase
from vllm.model_executor.layers.vocab_parallel_embedding import (
    ParallelLMHead,
    UnquantizedEmbeddingMethod,
    VocabParallelEmbedding,
)

from flashquant.config.keep import modules_of, overridden_modules
from flashquant.config.schema import RolloutConfig
from flashquant.config.schemes import has_numbers
from flashquant.errors import ConfigError
from flashquant.patches.seams.in_bf16 import QUANTIZABLE
from flashquant.patches.seams.kept import depth_of, names_in, patterns


def overridden(
    args: Any, config: RolloutConfig, checkpoint: Mapping[str, Any], kept: Iterable[str]
) -> tuple[dict[str, str], dict[str, list[str]]]:
    """The modules that an entry has in another scheme than the rest.

    Args:
        args: vLLM's `EngineArgs`.
        config: the entry.
        checkpoint: the model's configuration.
        kept: modules that stay in bf16.

    Returns:
        The scheme of each, by its name in the checkpoint; and by each scheme, what vLLM is told of
        its layers.

    Raises:
        ConfigError: one matches nothing, or what another one matches.

    """
    if not config.overrides:
        return {}, {}
    names = names_in(args.model, args.revision, "overrides")
    wanted = [(one.match, one.scheme) for one in config.overrides]
    chosen = overridden_modules(wanted, names, kept, depth_of(checkpoint))
    targets: dict[str, list[str]] = {}
    for scheme in dict.fromkeys(chosen.values()):
        mine = frozenset(module for module, held in chosen.items() if held == scheme)
        targets[scheme] = patterns(mine, modules_of(names))
    return chosen, targets


def check_created(model: nn.Module, overrides: Mapping[str, str]) -> None:
    """Refuse a scheme for a part of what vLLM computes as one layer, or for embeddings.

    Args:
        model: vLLM's, not loaded yet.
        overrides: the scheme of each module of the checkpoint that has another one.

    Raises:
        ConfigError: there is such a part, or vLLM has quantized embeddings.

    """
    embeddings = (
        (name, module)
        for name, module in model.named_modules()
        if isinstance(module, VocabParallelEmbedding) and not isinstance(module, ParallelLMHead)
    )
    for name, module in embeddings if overrides else ():
        if not isinstance(module.quant_method, UnquantizedEmbeddingMethod):
            raise ConfigError(
                f"overrides: what is matched has {name} in it, which holds embeddings. Match "
                "linear layers and experts only."
            )
    fused: Mapping[str, list[str]] = getattr(model, "packed_modules_mapping", {})
    for module, scheme in overrides.items():
        above, _, last = module.rpartition(".")
        for layer, parts in fused.items():
            others = [part for part in parts if overrides.get(f"{above}.{part}") != scheme]
            if last in parts and others:
                raise ConfigError(
                    f"overrides: {module} is to be in {scheme} and {others[0]} is not, but vLLM "
                    f"computes both in {layer}. Match all of {', '.join(parts)}, or none of them."
                )


def served_overrides(
    model: nn.Module,
    overrides: Mapping[str, str],
    landed: Mapping[str, tuple[str, ...]],
    vllm_config: VllmConfig,
) -> dict[str, str]:
    """Hold the engine to what was asked of it.

    Args:
        model: vLLM's, loaded.
        overrides: the scheme of each module of the checkpoint that was to have another one.
        landed: the parameters in which each tensor of the checkpoint landed, by its name.
        vllm_config: of the engine.

    Returns:
        Of those modules the ones that are here and quantized: norms are not, whatever matches them.

    Raises:
        ConfigError: one has the numbers of another scheme, or none at all is quantized.

    """
    found: dict[str, str] = {}
    here: set[str] = set()
    for name, targets in landed.items():
        (module,) = modules_of([name])
        if (scheme := overrides.get(module)) is None:
            continue
        here |= {scheme} if targets else set()
        for path in dict.fromkeys(target.rpartition(".")[0] for target in targets):
            method = getattr(model.get_submodule(path), "quant_method", None)
            if isinstance(method, QuantizeMethodBase) and not isinstance(method, QUANTIZABLE):
                _check_numbers(model.get_submodule(path), path, module, scheme, vllm_config)
                found[module] = scheme
    stages = vllm_config.parallel_config.pipeline_parallel_size
    for scheme in dict.fromkeys(overrides.values()):
        elsewhere = stages > 1 and scheme not in here  # all of it is in other stages
        if scheme not in found.values() and not elsewhere:
            first = next(module for module, held in overrides.items() if held == scheme)
            raise ConfigError(
                f"overrides: nothing that is matched for {scheme} is quantized by vLLM, {first} "
                "neither. Match linear layers, or leave it out."
            )
    return found


def _check_numbers(
    layer: nn.Module, path: str, module: str, scheme: str, vllm_config: VllmConfig
) -> None:
    """Look at the group of vLLM's config that a layer was made by."""
    config: Any = vllm_config.quant_config
    group = config.get_scheme_dict(layer, path)
    if not has_numbers(group, scheme):
        other = (group or {}).get("format")
        raise ConfigError(
            f"overrides: {module} is to be in {scheme}, and vLLM computes it in {path}, which has "
            f"another format ({other}). Match all that is computed in this layer, or "
            f"leave {module} out."
        )
