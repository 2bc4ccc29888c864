"""Mixtures of experts: routers stay in bf16, experts that no kernel serves are refused by name.

A router chooses the experts of a token. It is tiny, so that codes would save nothing, and a
token that goes to other experts costs more than any rounding; checkpoints of codes leave it
alone for that reason. vLLM's own online load quantizes it, and on the CPU its kernel for
blocks then ends the process, because a row an expert is too few for it.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from torch import nn
from vllm.config import VllmConfig, get_current_vllm_config_or_none
from vllm.model_executor.layers.fused_moe.router.gate_linear import GateLinear
from vllm.model_executor.layers.fused_moe.unquantized_fused_moe_method import (
    UnquantizedFusedMoEMethod,
)
from vllm.model_executor.layers.linear import ReplicatedLinear

from flashquant.config.schemes import SCHEMES, has_numbers
from flashquant.errors import UnsupportedEngine
from flashquant.patches.decided import (
    ADDITIONAL_CONFIG_KEY,
    STARTS_ON_FLOATS,
    asks_for_session,
    overrides_of,
    scheme_of,
)
from flashquant.patches.point import PatchPoint
from flashquant.patches.seams.emulation import is_emulated


def _init_replicated(
    original: Any,
    layer: nn.Module,
    input_size: int,
    output_size: int,
    bias: bool = True,
    skip_bias_add: bool = False,
    params_dtype: Any = None,
    quant_config: Any = None,
    prefix: str = "",
    **kwargs: Any,
) -> None:
    if _is_router(layer, output_size, get_current_vllm_config_or_none()):
        quant_config = None
    original(
        layer,
        input_size,
        output_size,
        bias,
        skip_bias_add,
        params_dtype,
        quant_config,
        prefix,
        **kwargs,
    )


def is_router(layer: nn.Module, config: VllmConfig) -> bool:
    """Whether a layer is in bf16 because it routes tokens."""
    return isinstance(layer, ReplicatedLinear) and _is_router(layer, layer.output_size, config)


def _is_router(layer: nn.Module, rows: int, config: VllmConfig | None) -> bool:
    """Whether an unsharded layer routes tokens: a row an expert, or one for the shared one.

    Since 0.31, vLLM has a class of its own for the former.
    """
    if config is None or not _decided(config).get(STARTS_ON_FLOATS):
        return False  # a checkpoint of codes says itself what it holds
    experts = config.model_config.get_num_experts()
    return isinstance(layer, GateLinear) or (experts > 0 and rows in (1, experts))


def _method_of_experts(original: Any, layer: nn.Module, prefix: str, *args: Any) -> Any:
    scheme = _scheme(layer, prefix)
    if scheme is None:
        return original(layer, prefix, *args)
    with _in_our_words(prefix, layer, scheme):
        method = original(layer, prefix, *args)
    _check_kernel(method, prefix, layer, scheme)
    return method


def _init_experts(original: Any, layer: nn.Module, *args: Any, **kwargs: Any) -> None:
    """Up to vLLM 0.23, where a layer of experts chooses its method in its `__init__`."""
    prefix = kwargs.get("prefix", "")
    scheme = _scheme(layer, prefix)
    if scheme is None:
        original(layer, *args, **kwargs)
        return
    with _in_our_words(prefix, layer, scheme):
        original(layer, *args, **kwargs)
    _check_kernel(layer.quant_method, prefix, layer, scheme)


def _scheme(layer: nn.Module, prefix: str) -> str | None:
    """What experts are to be stored in, in the engine that is being made, if it is flashquant's."""
    config = get_current_vllm_config_or_none()
    if config is None or not asks_for_session(config):
        return None
    quantization: Any = config.quant_config
    for scheme in dict.fromkeys(overrides_of(config).values()):
        if has_numbers(quantization.get_scheme_dict(layer, f"{prefix}.0.down_proj"), scheme):
            return scheme
    return scheme_of(config)


@contextmanager
def _in_our_words(prefix: str, layer: nn.Module, scheme: str) -> Iterator[None]:
    try:
        yield
    except (NotImplementedError, ValueError) as refusal:
        raise UnsupportedEngine(_no_kernel(prefix, layer, scheme, str(refusal))) from refusal


def _check_kernel(method: Any, prefix: str, layer: nn.Module, scheme: str) -> None:
    """Without a kernel, some methods are created all the same and fail once weights are in.

    Experts of four bits have kernels on some machines, and no way yet from bf16 into them.
    """
    lacks = "found none" if getattr(method, "experts_cls", method) is None else ""
    if SCHEMES[scheme].bits == 4:
        lacks = "takes packed codes only"
    elif is_emulated(SCHEMES[scheme]):
        lacks = "is emulated in Triton, which a CPU does not have"
    if lacks and not isinstance(method, UnquantizedFusedMoEMethod):
        said = f"{type(method).__name__} {lacks}"
        raise UnsupportedEngine(_no_kernel(prefix, layer, scheme, said))


def _no_kernel(prefix: str, layer: nn.Module, scheme: str, said: str) -> str:
    return (
        f"{prefix} ({type(layer).__name__}): vLLM has no kernel on this machine for experts in "
        f'{scheme} ({said.rstrip(". ")}). Leave the experts in bf16 by `keep: ["*.experts"]` in a '
        "file of FLASHRL_CONFIG, or serve the model in another scheme: docs/compatibility.md says "
        "which run where."
    )


def _decided(config: VllmConfig) -> dict[str, Any]:
    """What flashquant has decided for this engine, if it has configured it."""
    additional = config.additional_config
    found = additional.get(ADDITIONAL_CONFIG_KEY) if isinstance(additional, dict) else None
    return found or {}


POINTS = (
    PatchPoint(
        "vllm.model_executor.layers.linear:ReplicatedLinear.__init__",
        expects=(
            "self",
            "input_size",
            "output_size",
            "bias",
            "skip_bias_add",
            "params_dtype",
            "quant_config",
            "prefix",
            "return_bias",
            "disable_tp",
        ),
        wrapper=_init_replicated,
    ),
    PatchPoint(
        "vllm.model_executor.layers.fused_moe.routed_experts:RoutedExperts._get_quant_method",
        expects=("self", "prefix", "quant_config", "moe_config"),
        wrapper=_method_of_experts,
        within=">=0.24",
    ),
    PatchPoint(
        "vllm.model_executor.layers.fused_moe.layer:FusedMoE.__init__",
        expects=("self", "num_experts", "top_k", "hidden_size", "intermediate_size", ...),
        wrapper=_init_experts,
        within="<0.24",
    ),
)
