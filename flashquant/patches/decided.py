"""What was decided for an engine, as it travels in vLLM's `additional_config`."""

from __future__ import annotations

from typing import Final

from vllm.config import VllmConfig

from flashquant.config.checks import Checks

ADDITIONAL_CONFIG_KEY: Final = "flashquant"
PROFILE_KEY: Final = "profile"  # in it, where pushes are quantized by one
STARTS_ON_FLOATS: Final = "starts_on_floats"  # in it: the load makes the codes
KEPT_KEY: Final = "kept"  # in it: the modules of the checkpoint that stay in bf16
OVERRIDES_KEY: Final = "overrides"  # in it: the scheme of each module that has another one
LISTED_KEY: Final = "listed"  # in it, where they are those that FlashRL's list leaves out
EMULATE_KEY: Final = "emulate"  # in it, where vLLM's emulation computes on a CPU
KV_SCALES_KEY: Final = "kv_scales"  # in it, where the KV cache starts with some of its own
TOWERS_KEY: Final = "quantize_towers"  # in it, where they are: towers of multimodal models


def asks_for_session(vllm_config: VllmConfig) -> bool:
    """Whether this engine was configured by flashquant."""
    additional = vllm_config.additional_config
    return isinstance(additional, dict) and ADDITIONAL_CONFIG_KEY in additional


def checks_of(vllm_config: VllmConfig) -> Checks:
    """What is looked at in every update of an engine that flashquant has configured."""
    return Checks(**vllm_config.additional_config[ADDITIONAL_CONFIG_KEY]["checks"])


def scheme_of(vllm_config: VllmConfig) -> str:
    """What flashquant was asked to serve; bf16 where it was not asked."""
    if not asks_for_session(vllm_config):
        return "bf16"
    return str(vllm_config.additional_config[ADDITIONAL_CONFIG_KEY]["scheme"])


def overrides_of(vllm_config: VllmConfig) -> dict[str, str]:
    """The modules of the checkpoint that are to be stored in another scheme, and in which."""
    if not asks_for_session(vllm_config):
        return {}
    return dict(vllm_config.additional_config[ADDITIONAL_CONFIG_KEY].get(OVERRIDES_KEY, {}))


def schemes_of(vllm_config: VllmConfig | None) -> frozenset[str]:
    """All that flashquant was asked to serve; none where there is no engine."""
    if vllm_config is None:
        return frozenset()
    return frozenset({scheme_of(vllm_config), *overrides_of(vllm_config).values()})


def kept_by(vllm_config: VllmConfig) -> frozenset[str]:
    """The modules of the checkpoint that flashquant was asked to leave in bf16."""
    if not asks_for_session(vllm_config):
        return frozenset()
    return frozenset(vllm_config.additional_config[ADDITIONAL_CONFIG_KEY].get(KEPT_KEY, ()))


def kv_scales_of(vllm_config: VllmConfig) -> dict[str, tuple[float, float]]:
    """The scales that the KV cache starts with, by attention layer; empty for vLLM's."""
    if not asks_for_session(vllm_config):
        return {}
    held = vllm_config.additional_config[ADDITIONAL_CONFIG_KEY].get(KV_SCALES_KEY, {})
    return {name: (keys, values) for name, (keys, values) in held.items()}


def lists_layers(vllm_config: VllmConfig) -> bool:
    """Whether a profile of FlashRL's lists what is quantized."""
    if not asks_for_session(vllm_config):
        return False
    return LISTED_KEY in vllm_config.additional_config[ADDITIONAL_CONFIG_KEY]


def emulates(vllm_config: VllmConfig | None) -> bool:
    """Whether vLLM's emulation of its kernels computes on this CPU, because it was asked for."""
    if vllm_config is None or not asks_for_session(vllm_config):
        return False
    return EMULATE_KEY in vllm_config.additional_config[ADDITIONAL_CONFIG_KEY]


def keeps_towers(vllm_config: VllmConfig) -> bool:
    """Whether towers of a multimodal model stay in bf16, where its other layers are quantized."""
    if not asks_for_session(vllm_config):
        return False
    decided = vllm_config.additional_config[ADDITIONAL_CONFIG_KEY]
    return bool(decided[STARTS_ON_FLOATS]) and TOWERS_KEY not in decided
