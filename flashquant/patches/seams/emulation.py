"""Schemes for which vLLM has kernels on GPUs only, on a CPU: computed by vLLM's own emulation.

vLLM can compute them in software: it makes floats of the codes, and multiplies those. Nothing in it
needs a GPU; vLLM's lists of kernels just have none of a CPU. FLASHQUANT_EMULATE=1 puts it there, so
that what is served on GPUs can be tried, and tested, without one.
"""

from __future__ import annotations

import logging
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any

from torch import Tensor, nn
from vllm.config import get_current_vllm_config_or_none
from vllm.model_executor.kernels import linear
from vllm.model_executor.layers.quantization.utils.nvfp4_emulation_utils import (
    dequantize_to_dtype,
)
from vllm.platforms import PlatformEnum, current_platform

from flashquant.config import env
from flashquant.config.schemes import SCHEMES, Scheme
from flashquant.errors import ConfigError
from flashquant.patches.decided import emulates
from flashquant.patches.point import PatchPoint

logger = logging.getLogger(__name__)


def is_emulated(scheme: Scheme) -> bool:
    """Whether this machine has no kernel of a scheme but vLLM's emulation."""
    return scheme.emulated and bool(current_platform.is_cpu())


def asks_to_emulate(name: str, environ: Mapping[str, str]) -> bool:
    """Whether an engine in a scheme is to compute by emulation here.

    Raises:
        ConfigError: it would have to, and nobody has asked for that.

    """
    if not is_emulated(SCHEMES[name]):
        return False
    if not env.EMULATE.read(environ):
        raise ConfigError(
            f"vLLM has no kernel of {name} for CPUs. {env.EMULATE.name}=1 serves it through vLLM's "
            "emulation in software, slowly, to try it; int8 and the schemes of fp8 have kernels."
        )
    logger.warning(
        "%s is computed by vLLM's emulation on this CPU, which makes floats of all codes: slower "
        "than bf16, and hardly smaller. It is here to be tried (docs/schemes.md)",
        name,
    )
    return True


@contextmanager
def _listed(kernels: dict[Any, Any], kernel: type) -> Iterator[None]:
    """Let vLLM find a kernel where it chooses one for a CPU, if emulation was asked for."""
    if not emulates(get_current_vllm_config_or_none()):
        yield
        return
    before = kernels.get(PlatformEnum.CPU)
    kernels[PlatformEnum.CPU] = [kernel]
    try:
        yield
    finally:
        del kernels[PlatformEnum.CPU]
        if before is not None:
            kernels[PlatformEnum.CPU] = before


def _init_mxfp8(original: Any, *args: Any, **kwargs: Any) -> Any:
    with _listed(linear._POSSIBLE_MXFP8_KERNELS, linear.EmulationMxfp8LinearKernel):
        return original(*args, **kwargs)


def _init_nvfp4(original: Any, use_a16: bool = False) -> Any:
    """Without codes of activations, vLLM would take no kernel but those of GPUs."""
    with _listed(linear._POSSIBLE_NVFP4_KERNELS, linear.EmulationNvFp4LinearKernel):
        emulated = emulates(get_current_vllm_config_or_none())
        return original(use_a16=use_a16 and not emulated)


def _multiply_nvfp4(
    original: Any, kernel: Any, layer: Any, x: Tensor, bias: Tensor | None = None
) -> Tensor:
    """Activations become codes by a scale from the checkpoint; where there is none, they stay."""
    if hasattr(layer, "input_global_scale_inv"):
        result: Tensor = original(kernel, layer, x, bias)
        return result
    weight = dequantize_to_dtype(
        layer.weight, layer.weight_scale, layer.weight_global_scale, x.dtype, swizzle=False
    )
    return nn.functional.linear(x, weight, bias)


POINTS = (
    PatchPoint(
        "vllm.model_executor.layers.quantization.online.mxfp8:init_mxfp8_linear_kernel",
        expects=(...,),
        wrapper=_init_mxfp8,
    ),
    PatchPoint(
        "vllm.model_executor.layers.quantization.compressed_tensors.schemes."
        "compressed_tensors_w4a4_nvfp4:init_nvfp4_linear_kernel",
        expects=("use_a16",),
        wrapper=_init_nvfp4,
    ),
    PatchPoint(
        "vllm.model_executor.kernels.linear.nvfp4.emulation:"
        "EmulationNvFp4LinearKernel.apply_weights",
        expects=("self", "layer", "x", "bias"),
        wrapper=_multiply_nvfp4,
    ),
)
