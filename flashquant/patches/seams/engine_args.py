"""The configuration enters the engine: FLASHRL_CONFIG becomes engine arguments.

The seam is the last moment before vLLM reads the model's own configuration, in
the process that creates the engine. What was decided travels inside vLLM's
`additional_config`, so workers in other processes need no environment to know.
"""

from __future__ import annotations

import logging
import os
from collections import Counter
from collections.abc import Mapping
from typing import Any, Final

import vllm
from transformers import PretrainedConfig

from flashquant.config import env
from flashquant.config.checks import Checks, checks_from_env
from flashquant.config.locate import Located, split_revision
from flashquant.config.resolve import check_profile_is_for, profile_of
from flashquant.config.schema import FlashConfig, RolloutConfig, config_from_env
from flashquant.config.schemes import SCHEMES, Scheme
from flashquant.errors import ConfigError
from flashquant.patches.channels import ENTRY
from flashquant.patches.decided import (
    ADDITIONAL_CONFIG_KEY,
    EMULATE_KEY,
    KEPT_KEY,
    KV_SCALES_KEY,
    LISTED_KEY,
    OVERRIDES_KEY,
    PROFILE_KEY,
    STARTS_ON_FLOATS,
    TOWERS_KEY,
)
from flashquant.patches.guard import vllm_is
from flashquant.patches.point import PatchPoint
from flashquant.patches.seams.emulation import asks_to_emulate
from flashquant.patches.seams.kept import keep_in_bf16
from flashquant.patches.seams.logprobs import configure_logprobs
from flashquant.patches.seams.overrides import overridden
from flashquant.patches.seams.quantization_args import choose_quantization, held_as
from flashquant.profiles import load_kv_scales, load_profile

logger = logging.getLogger(__name__)

# Of vLLM's weight transfers, and what they do.
_OTHER_WRITERS: Final = {
    "sparse_nccl": "sends NaN for what has not changed, and NaN is refused",
    "sharded_rdt": "writes into the parameters itself, so that nothing would be quantized",
    "modelexpress": "installs weights by code of its own, past vLLM's loaders",
}


def _create_model_config(original: Any, args: Any) -> Any:
    flash = config_from_env(os.environ)
    if flash is not None:
        env.check(os.environ)
        entry = ENTRY.get(args) or flash.for_rank(rank_of(args, flash, os.environ))
        emulate = any(asks_to_emulate(scheme, os.environ) for scheme in entry.schemes)
        configure(args, entry, checks_from_env(os.environ), emulate=emulate)
        configure_logprobs(args, os.environ)
    return original(args)


def rank_of(args: Any, flash: FlashConfig, environ: Mapping[str, str]) -> int:
    """Which data-parallel rank an engine is, where it is one in a process of its own.

    As vLLM tells it: an argument, torchrun's rank for engines that it started
    (FlashRL's way), or `VLLM_DP_RANK` of its offline examples.
    """
    if args.data_parallel_rank is not None:
        return int(args.data_parallel_rank)
    backend = args.distributed_executor_backend or flash.configs[0].distributed_executor_backend
    rank = env.RANK.read(environ)
    if backend == "external_launcher" and rank >= 0:
        ranks: int = args.tensor_parallel_size * args.pipeline_parallel_size
        return rank // ranks
    return env.DP_RANK.read(environ)


def configure(args: Any, config: RolloutConfig, checks: Checks, *, emulate: bool = False) -> None:
    """Write one configuration into vLLM's engine arguments.

    The scheme decides; executor backend and load format from a file are defaults
    that an explicit argument overrides.

    Args:
        args: vLLM's `EngineArgs`, changed in place.
        config: the entry of FLASHRL_CONFIG that this engine serves.
        checks: which proofs its reloads carry.
        emulate: whether vLLM's emulation computes, for want of kernels.

    Raises:
        ConfigError: the configuration asks for something that is not built, or
            that an explicit argument contradicts; or its profile cannot be had.
        ProfileError: its profile cannot be read.

    """
    _refuse_what_is_not_served(config)
    _refuse_moving_experts(args)
    _refuse_other_writers(args, config)
    _refuse_scales_of_shards(args, config)
    _apply_defaults(args, config)
    _cache_as_asked(args, config)
    checkpoint, _ = PretrainedConfig.get_config_dict(args.model, revision=args.revision)
    own = checkpoint.get("quantization_config")
    profile = _profile_of(config)
    _check_profile(profile, config, args.model, is_quantized=own is not None)
    decided = _decided(config, checks, profile, starts_on_floats=own is None)
    kept = keep_in_bf16(args, config, checkpoint)
    overrides, others = overridden(args, config, checkpoint, kept)
    choose_quantization(args, config, own, others)
    if config.params_to_ignore:
        logger.warning(
            "params_to_ignore has no effect, as in FlashRL, which never reads it: what a reload "
            "writes is learned from vLLM's loader. To keep layers in bf16, write `keep`"
        )
    if kept:
        decided[KEPT_KEY] = kept
    if overrides:
        decided[OVERRIDES_KEY] = overrides
    if emulate:
        decided[EMULATE_KEY] = True
    if config.profile is not None and SCHEMES[config.scheme].lists_layers:
        decided[LISTED_KEY] = True
    args.additional_config = {**(args.additional_config or {}), ADDITIONAL_CONFIG_KEY: decided}
    by = f", {len(kept)} modules kept in bf16" if kept else ""
    by += "".join(
        f", {count} modules in {scheme}" for scheme, count in Counter(overrides.values()).items()
    )
    by += "" if profile is None else f" by {profile.reference}, scales {config.scales}"
    logger.info("flashquant serves %s in %s%s", args.model, config.scheme, by)


def _apply_defaults(args: Any, config: RolloutConfig) -> None:
    """Fill in what a file says of the model, of its load format and of the executor's backend."""
    if config.model is not None:
        args.model, revision = split_revision(config.model)
        args.revision = revision or args.revision
    if config.load_format is not None and args.load_format == "auto":
        args.load_format = config.load_format
    if args.distributed_executor_backend is None:
        args.distributed_executor_backend = config.distributed_executor_backend


def _cache_as_asked(args: Any, config: RolloutConfig) -> None:
    """The format of the KV cache, which an explicit argument may name, too.

    Raises:
        ConfigError: the two differ, or scales would be computed of the first prompt.

    """
    if config.kv_cache is None:
        return
    if args.kv_cache_dtype not in ("auto", config.kv_cache, f"{config.kv_cache}_e4m3"):
        raise ConfigError(
            f"FLASHRL_CONFIG asks for kv_cache {config.kv_cache!r}, but the engine was given "
            f"kv_cache_dtype={args.kv_cache_dtype!r}. Drop one of the two."
        )
    if getattr(args, "calculate_kv_scales", False):  # before vLLM has dropped it
        raise ConfigError(
            "calculate_kv_scales=True takes the scales of the KV cache from the first prompt, so "
            "that no two engines have the same. Leave it out, and send scales by "
            "flashquant.reload_weights(..., kv_scales=...)."
        )
    args.kv_cache_dtype = config.kv_cache


def _check_profile(
    profile: Located | None, config: RolloutConfig, model: str, *, is_quantized: bool
) -> None:
    """Refuse a scheme without the profile it needs, and a profile without its checkpoint.

    Raises:
        ConfigError: there is none where one is needed, it is for another scheme, or it needs a W8A8
            checkpoint.
        ProfileError: it cannot be read, which is better known here than in a worker.

    """
    if profile is None:
        if config.scheme == "int8_prune":
            raise ConfigError(
                "int8_prune silences norms by what a profile says of them, and there is none. Name "
                "it under `profile`, or use int8."
            )
        return
    if config.overrides:
        raise ConfigError(
            f"the profile {profile.reference}, which lies in the model, scales the layers of one "
            "scheme, and overrides asks for several. Take it away, or leave overrides out."
        )
    read = load_profile(profile.path)
    check_profile_is_for(read.scheme, config, profile)
    if not read.knows_weight_scales() and not is_quantized:
        raise ConfigError(
            f"the profile {profile.reference} scales by what its W8A8 checkpoint holds, and "
            f"{model} is not quantized. Name that checkpoint under `model`, or leave "
            "`profile` out for plain per-channel int8."
        )


def _decided(
    config: RolloutConfig, checks: Checks, profile: Located | None, *, starts_on_floats: bool
) -> dict[str, Any]:
    """What travels to the workers, in vLLM's `additional_config`."""
    decided: dict[str, Any] = {
        "scheme": held_as(SCHEMES[config.scheme]),
        STARTS_ON_FLOATS: starts_on_floats,
        "checks": checks.model_dump(),
    }
    if config.kv_scales is not None:
        decided[KV_SCALES_KEY] = load_kv_scales(config.kv_scales)
    if config.quantize_towers:
        decided[TOWERS_KEY] = True
    if profile is not None:
        decided[PROFILE_KEY] = {
            "reference": profile.reference,
            "scales": config.scales,
            "starts_on_floats": starts_on_floats,
            "warn_above": config.clipped_warning,
            "prunes": config.scheme == "int8_prune",
        }
    return decided


def _refuse_what_is_not_served(config: RolloutConfig) -> None:
    for name in config.schemes:
        scheme = SCHEMES[name]
        if not is_served(scheme):
            raise ConfigError(
                f"{name} is a valid name, but its scheme is not served in vLLM "
                f"{vllm.__version__}: {scheme.instead}. Use another scheme."
            )


def is_served(scheme: Scheme) -> bool:
    """Whether the vLLM that is installed serves it."""
    return scheme.vllm is not None and vllm_is(scheme.vllm)


def _refuse_scales_of_shards(args: Any, config: RolloutConfig) -> None:
    """Rows are scaled whole; before vLLM 0.28 a fresh start scales what each rank has of them."""
    cut_up = config.scheme == "fp8_channel" and args.tensor_parallel_size > 1
    if cut_up and not vllm_is(">=0.28"):
        raise ConfigError(
            f"fp8_channel over {args.tensor_parallel_size} tensor-parallel ranks needs vLLM 0.28 "
            f"or newer, and this is {vllm.__version__}, where a push does not equal a fresh start. "
            "Use int8, one rank, or a newer vLLM."
        )


def _refuse_moving_experts(args: Any) -> None:
    """Balancing copies experts from slot to slot, and plans know where they were at the start."""
    if args.enable_eplb:
        raise ConfigError(
            "enable_eplb=True moves experts between GPUs while the engine serves, so that a pushed "
            "expert would be written where another one lies by now. Start the engine without it, "
            "or unset FLASHRL_CONFIG to run unpatched."
        )


def _refuse_other_writers(args: Any, config: RolloutConfig) -> None:
    """Those that bring no tensors which could be quantized, or compared.

    `nccl_m2n` hands them to vLLM's loader where the model is quantized or cut into stages.
    """
    backend = getattr(args.weight_transfer_config, "backend", "")
    does = _OTHER_WRITERS.get(backend)
    whole = config.schemes == ("bf16",) and args.pipeline_parallel_size == 1
    if backend == "nccl_m2n" and whole:
        does = "writes into the parameters of a bf16 model itself, where nothing can be taken back"
    if does:
        raise ConfigError(
            f"weight_transfer_config has backend={backend!r}, which {does}. Use 'nccl' or 'ipc', "
            "or send what changed by flashquant.sender."
        )


def _profile_of(config: RolloutConfig) -> Located | None:
    """The profile of an entry; one that its scheme has no use for is named in the log."""
    asked = SCHEMES[config.scheme]
    if config.profile is not None and not (asked.takes_profile or asked.lists_layers):
        logger.warning(
            "%s needs no profile; %s is not read, as in FlashRL", config.fn, config.profile
        )
    return profile_of(config)


POINTS = (
    PatchPoint(
        "vllm.engine.arg_utils:EngineArgs.create_model_config",
        expects=("self",),
        wrapper=_create_model_config,
    ),
)
