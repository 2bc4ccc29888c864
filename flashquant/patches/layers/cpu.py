"""What the CPU engine needs before it can serve flashquant's schemes at all.

1. Permission to use the AMX tiles: the kernel grants it per process, on request;
   an attention without it dies with SIGILL.
2. `scaled_fp8_quant`: vLLM declares the op for the CPU and leaves it empty,
   so per-tensor fp8 can neither load nor run. Here it is flashquant's definition.
3. The CPU fp8 matmuls read a float32 bias, and are handed a bf16 one.
4. A oneDNN handler keeps a raw pointer to its scales: it has to be that of the live ones, also
   where it is made before they hold the values that it is for (`handlers_point_at`).
5. Of a weight that two modules share, each packs a copy: twice the memory, and twice the time,
   for a matmul of the embeddings that is never called. They are handed one (`packed_once`).
6. The fp8 matmul for blocks computes 32 rows at a time. Where some are left over, it ends the
   process at the first batch of four tokens or less; such a layer is refused while it loads.
7. The int8 matmul for AMX takes rows only, and so does the bf16 one before vLLM 0.29. Models that
   run transformers' own code (OLMo 2, GPT-NeoX, SmolLM3) and vision towers hand them a batch of
   sequences, as rows from here on.
8. Keys and values are cut off on their way into a cache in fp8, towards zero, where GPUs round
   them to nearest: all of them come out smaller, and SmolLM2 three times as far from itself.
   They come rounded, so that there is nothing left to cut off.

Nothing here touches another platform.

For 4 and 5, vLLM's processing lies between who knows (the callers of the two functions) and who is
to act (the wrapped functions that make handlers), so what is known travels in context variables.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor

from flashquant.patches.channels import Ambient
from flashquant.patches.point import PatchPoint
from flashquant.schemes import fp8_channel, fp8_static, fp8_tensor


def allow_amx() -> bool:
    """Ask the operating system for the AMX tiles; False where there are none."""
    if not torch.cpu._is_amx_tile_supported():
        return False
    return bool(torch.cpu._init_amx())


def _scaled_fp8_quant(
    original: Any,
    input: Tensor,
    scale: Tensor | None = None,
    num_token_padding: int | None = None,
    scale_ub: Tensor | None = None,
    use_per_token_if_dynamic: bool = False,
    output: Tensor | None = None,
    group_shape: tuple[int, int] | None = None,
) -> tuple[Tensor, Tensor]:
    if input.device.type != "cpu":
        result: tuple[Tensor, Tensor] = original(
            input, scale, num_token_padding, scale_ub, use_per_token_if_dynamic, output, group_shape
        )
        return result
    if scale_ub is not None or (scale is not None and scale.numel() != 1):
        raise NotImplementedError(
            "on the CPU, flashquant quantizes activations to fp8 per tensor or per token, without "
            "an upper bound of the scale and without groups"
        )
    if scale is not None:
        codes = fp8_static(input, scale.float())
    elif use_per_token_if_dynamic:
        codes, scale = fp8_channel(input)
    else:
        codes, scale = fp8_tensor(input)
    if num_token_padding is not None and num_token_padding > codes.shape[0]:
        missing = num_token_padding - codes.shape[0]
        codes = torch.cat([codes, codes.new_empty((missing, codes.shape[1]))])
    return (codes if output is None else output.copy_(codes)), scale


class LiveScales(dict[int, Tensor]):
    """Live scales, by the address of the new values that a handler is being made with.

    Attributes:
        refused: a handler was made that reads its scales at once.

    """

    refused = False


_scales = Ambient[LiveScales]("flashquant_scales")
handlers_point_at = _scales.given  # live scales, whatever these hold while handlers are made


def _create_onednn_scaled_mm(
    original: Any,
    weight: Tensor,
    weight_scales: Tensor,
    output_type: Any,
    dynamic_quant: bool,
    *args: Any,
    **kwargs: Any,
) -> Any:
    scales = _scales.get()
    if scales is not None:
        scales.refused |= not dynamic_quant
        weight_scales = scales.get(weight_scales.data_ptr(), weight_scales)
    return original(weight, weight_scales, output_type, dynamic_quant, *args, **kwargs)


_packed = Ambient[dict[int, Any]]("flashquant_packed")  # handlers by the address of their weight


@contextmanager
def packed_once(shared: Iterable[Tensor]) -> Iterator[None]:
    """Modules that hold one of these weights get one handler, which packs it once.

    Args:
        shared: weights that several modules hold; they stay as they are inside.

    """
    kept = list(shared)  # alive until the end: nothing else may come to lie at their addresses
    with _packed.given({weight.data_ptr(): None for weight in kept}):
        yield


def _create_onednn_mm(original: Any, weight: Tensor, *args: Any, **kwargs: Any) -> Any:
    packed, address = _packed.get() or {}, weight.data_ptr()
    handler = packed.get(address)
    if handler is None or (handler.k, handler.n) != tuple(weight.shape):
        handler = original(weight, *args, **kwargs)
        if address in packed:
            packed[address] = handler
    return handler


def _with_float32_bias(
    original: Any, kernel: Any, layer: Any, x: Tensor, bias: Tensor | None = None, **kwargs: Any
) -> Tensor:
    result: Tensor = original(kernel, layer, x, None if bias is None else bias.float(), **kwargs)
    return result


def _by_rows(multiply: Callable[[Tensor], Tensor], x: Tensor) -> Tensor:
    """Flatten `[..., K]` to `[M, K]` for a kernel, and give its `[M, N]` the shape `[..., N]`."""
    if x.dim() == 2:
        return multiply(x)
    result = multiply(x.reshape(-1, x.shape[-1]))
    return result.reshape(*x.shape[:-1], result.shape[-1])


def _int8_by_rows(
    original: Any, kernel: Any, layer: Any, x: Tensor, bias: Tensor | None = None
) -> Tensor:
    return _by_rows(lambda rows: original(kernel, layer, rows, bias), x)


def _unquantized_by_rows(
    original: Any, layer: Any, x: Tensor, weight: Tensor, bias: Tensor | None = None
) -> Tensor:
    return _by_rows(lambda rows: original(layer, rows, weight, bias), x)


def _reshape_and_cache(
    original: Any,
    key: Tensor,
    value: Tensor,
    key_cache: Tensor,
    value_cache: Tensor,
    slot_mapping: Tensor,
    isa: str,
    k_scale: float = 1.0,
    v_scale: float = 1.0,
    kv_cache_dtype: str = "auto",
) -> None:
    if (form := _FORMS_OF_CACHES.get(kv_cache_dtype)) is not None:
        # What they round to, every dtype of a model holds: it is cached under a scale of 1.
        key, k_scale = _rounded(key, k_scale, form), 1.0
        value, v_scale = _rounded(value, v_scale, form), 1.0
    original(
        key, value, key_cache, value_cache, slot_mapping, isa, k_scale, v_scale, kv_cache_dtype
    )


def _rounded(cached: Tensor, scale: float, form: torch.dtype) -> Tensor:
    largest = torch.finfo(form).max  # of what is beyond, torch makes NaN or inf, or did (2.11)
    scaled = cached if scale == 1 else cached.float() / scale  # at each layer of each step
    return scaled.clamp(-largest, largest).to(form).to(cached.dtype)


def _refuse_left_over_rows(original: Any, kernel: Any, layer: Any) -> None:
    rows = layer.weight.shape[0]
    if rows % _ROWS_AT_A_TIME:
        # `naming_the_layer` says in which layer, and what helps.
        raise ValueError(
            f"it has {rows} rows, and vLLM's CPU kernel for blocks of fp8 computes "
            f"{_ROWS_AT_A_TIME} at a time: the rest would end the process"
        )
    original(kernel, layer)


_ROWS_AT_A_TIME = 32
_FORMS_OF_CACHES = {
    "fp8": torch.float8_e4m3fn,
    "fp8_e4m3": torch.float8_e4m3fn,
    "fp8_e5m2": torch.float8_e5m2,
}
_KERNELS = "vllm.model_executor.kernels.linear.scaled_mm.cpu"

POINTS = (
    PatchPoint(
        "vllm._custom_ops:scaled_fp8_quant",
        expects=(
            "input",
            "scale",
            "num_token_padding",
            "scale_ub",
            "use_per_token_if_dynamic",
            "output",
            "group_shape",
        ),
        wrapper=_scaled_fp8_quant,
    ),
    PatchPoint(
        "vllm._custom_ops:create_onednn_scaled_mm",
        expects=("weight", "weight_scales", "output_type", "dynamic_quant", ...),
        wrapper=_create_onednn_scaled_mm,
    ),
    PatchPoint(
        "vllm._custom_ops:create_onednn_mm",
        expects=("weight", ...),
        wrapper=_create_onednn_mm,
    ),
    PatchPoint(
        "vllm._custom_ops:cpu_attn_reshape_and_cache",
        expects=(
            "key",
            "value",
            "key_cache",
            "value_cache",
            "slot_mapping",
            "isa",
            "k_scale",
            "v_scale",
            "kv_cache_dtype",
        ),
        wrapper=_reshape_and_cache,
    ),
    PatchPoint(
        f"{_KERNELS}:CPUInt8ScaledMMLinearKernel.apply_weights",
        expects=("self", "layer", "x", "bias"),
        wrapper=_int8_by_rows,
    ),
    PatchPoint(
        "vllm.model_executor.layers.utils:cpu_unquantized_gemm",
        expects=("layer", "x", "weight", "bias"),
        wrapper=_unquantized_by_rows,
    ),
    PatchPoint(
        f"{_KERNELS}:CPUFp8PerTensorScaledMMLinearKernel.apply_weights",
        expects=("self", "layer", "x", "bias"),
        wrapper=_with_float32_bias,
        within=">=0.31",  # before, torch's own matmul serves per-tensor fp8: it takes any bias
    ),
    PatchPoint(
        f"{_KERNELS}:CPUFp8BlockScaledMMKernel.process_weights_after_loading",
        expects=("self", "layer"),
        wrapper=_refuse_left_over_rows,
    ),
    PatchPoint(
        f"{_KERNELS}:CPUFp8BlockScaledMMKernel.apply_weights",
        expects=("self", "layer", "x", "bias", "kwargs"),
        wrapper=_with_float32_bias,
    ),
)
