"""A GPU that is not there: vLLM chooses and packs for it, on CPU tensors.

vLLM's Python for CUDA is in the CPU wheel too. What it asks of the platform is answered for
the GPU in question, in its model executor only; the few device operations that packing itself
calls are replaced by stand-ins. Nothing can run on such a model, but everything its kernels
would read is there, laid out by vLLM's own code.

A stand-in either is vLLM's own reference of the operation (Marlin's repack), or is marked
`opaque`: it moves and mixes bytes in a fixed way that is not the device's. What follows from an
opaque one is that the layout is packed and carried over in place, not which bytes it has.
"""

from __future__ import annotations

import functools
import sys
from collections.abc import Iterator, Mapping
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import dataclass, field
from types import FunctionType, ModuleType, SimpleNamespace
from typing import Any
from unittest import mock

import torch
import vllm.envs
from torch import Tensor
from vllm import _custom_ops as ops
from vllm import platforms
from vllm.model_executor.layers.fused_moe.oracle import fp8, int8
from vllm.model_executor.model_loader import base_loader
from vllm.platforms.interface import DeviceCapability, PlatformEnum
from vllm.utils import deep_gemm, flashinfer

from flashquant.schemes import native

_REAL = platforms.current_platform
_CACHED = type(functools.cache(lambda: None))

# Imported while pretending, they would keep what they were told.
for _backends in (fp8, int8):
    for _backend in vars(_backends)[f"{_backends.__name__.rpartition('.')[2].title()}MoeBackend"]:
        with suppress(ValueError, ImportError):  # one that has no kernels, or not here
            _backends.backend_to_kernel_cls(_backend)


@dataclass(frozen=True)
class Machine:
    """A GPU, and what is installed beside vLLM.

    Attributes:
        capability: 80 is Ampere, 89 Ada, 90 Hopper, 100 and 120 Blackwell.
        has: of `flashinfer`, `deep_gemm`.
        without: names of kernels that VLLM_DISABLED_KERNELS switches off.
        settings: more of vLLM's environment variables, as it understands them.

    """

    name: str
    capability: int
    has: frozenset[str] = frozenset()
    without: tuple[str, ...] = ()
    settings: Mapping[str, Any] = field(default_factory=dict)
    enum: PlatformEnum = PlatformEnum.CUDA
    fnuz: bool = False
    cutlass_fp8: bool = True  # CUDA 12.4 or newer


class _Platform:
    """vLLM's platform object, with the questions answered that a GPU answers otherwise."""

    def __init__(self, machine: Machine) -> None:
        self._machine = machine
        self._enum = machine.enum

    def __getattr__(self, name: str) -> Any:
        # Bound to this object, so that what it asks in turn is answered for the machine too.
        function = getattr(getattr(type(_REAL), name, None), "__func__", None)
        return functools.partial(function, self) if function else getattr(_REAL, name)

    def get_device_capability(self, device_id: int = 0) -> DeviceCapability:
        return DeviceCapability(*divmod(self._machine.capability, 10))

    def is_cuda(self) -> bool:
        return self._enum == PlatformEnum.CUDA

    def is_rocm(self) -> bool:
        return self._enum == PlatformEnum.ROCM

    def is_cpu(self) -> bool:
        return False

    def is_cuda_alike(self) -> bool:
        return True

    def supports_fp8(self) -> bool:
        return self._machine.capability >= 89

    def support_deep_gemm(self) -> bool:
        return self._machine.capability // 10 in (9, 10, 12)

    def is_fp8_fnuz(self) -> bool:
        return self._machine.fnuz

    def fp8_dtype(self) -> torch.dtype:
        return torch.float8_e4m3fnuz if self._machine.fnuz else torch.float8_e4m3fn


@contextmanager
def pretending(machine: Machine) -> Iterator[None]:
    """While this lasts, vLLM's model executor believes that it is on `machine`."""
    with _forgetting(), ExitStack() as stack:
        put = functools.partial(_put, stack)
        platform = _Platform(machine)
        for module in _users_of_the_platform():
            put(module, "current_platform", platform)
        # Not the environment: vLLM stops reading it once an engine has been started.
        for name, value in {"VLLM_DISABLED_KERNELS": machine.without, **machine.settings}.items():
            stack.enter_context(mock.patch.object(vllm.envs, name, value))
        for name, value in _device_operations(machine).items():
            put(ops, name, value)
        for module, name, value in [*_constants(machine), *_answers(machine)]:
            put(module, name, value)
        stack.enter_context(mock.patch.dict(sys.modules, {**_flashinfer(), **_rocm(machine)}))
        # What quantizes there is an operation of torch; C on host memory would not be seen.
        put(native, "kernels", lambda: None)
        put(torch.accelerator, "empty_cache", lambda: None)
        put(torch.accelerator, "current_device_index", lambda: torch.device("cpu"))
        yield


@contextmanager
def _forgetting() -> Iterator[None]:
    """What vLLM has cached meanwhile is about a machine that is not there."""
    caches = _caches(len(sys.modules))
    before = [cache.cache_info().currsize for cache in caches]
    try:
        yield
    finally:
        for cache, size in zip(caches, before, strict=True):
            if cache.cache_info().currsize != size:
                cache.cache_clear()


@functools.lru_cache(maxsize=1)
def _caches(_: int) -> list[Any]:
    """All of vLLM's; looked for again when there are more modules."""
    found = {id(value): value for _, _, value in _globals(_CACHED)}
    return list(found.values())


def _globals(kind: Any) -> Iterator[tuple[ModuleType, str, Any]]:
    """The global names of vLLM's modules that hold something of a kind."""
    for module_name, module in list(sys.modules.items()):
        if module_name.startswith("vllm."):
            for name, value in list(vars(module).items()):
                if isinstance(value, kind):
                    yield module, name, value


def _put(stack: ExitStack, owner: Any, name: str, value: Any) -> None:
    stack.enter_context(mock.patch.object(owner, name, value, create=not hasattr(owner, name)))


def _users_of_the_platform() -> list[Any]:
    """What loads, chooses and packs; not attention, which stays on the CPU's own."""
    rooms = (
        "flashquant.patches.seams",
        "vllm.model_executor.kernels",
        "vllm.model_executor.layers.fused_moe",
        "vllm.model_executor.layers.linear",
        "vllm.model_executor.layers.quantization",
        "vllm.model_executor.layers.utils",
        "vllm.model_executor.layers.vocab_parallel_embedding",
        "vllm.utils.deep_gemm",
        "vllm.utils.flashinfer",
    )
    return [
        module
        for name, module in list(sys.modules.items())
        if name.startswith(rooms) and getattr(module, "current_platform", None) is _REAL
    ]


def _device_operations(machine: Machine) -> dict[str, Any]:
    """What vLLM's compiled part for CUDA answers or does, and its part for the CPU does not."""
    new = machine.cutlass_fp8
    return {
        "cutlass_scaled_mm_supports_fp8": lambda capability: capability >= 89 and new,
        "cutlass_scaled_mm_supports_block_fp8": lambda capability: capability >= 90,
        "cutlass_group_gemm_supported": lambda capability: capability // 10 in (9, 10),
        "gptq_marlin_repack": gptq_marlin_repack,
        "machete_prepack_B": machete_prepack_B,
    }


def _constants(machine: Machine) -> list[tuple[Any, str, Any]]:
    """What vLLM decides while it is imported, or once and for all."""
    from vllm.model_executor.kernels.linear.scaled_mm import cutlass
    from vllm.model_executor.layers.quantization.online.fp8 import Fp8PerTensorOnlineLinearMethod
    from vllm.model_executor.layers.quantization.utils import quant_utils

    cuda = machine.enum == PlatformEnum.CUDA
    per_token = cuda and machine.capability >= 89 and machine.cutlass_fp8
    keys = quant_utils.kFp8DynamicTokenSym, quant_utils.kFp8DynamicTensorSym
    return [
        (cutlass, "CUTLASS_BLOCK_FP8_SUPPORTED", cuda and machine.capability >= 90),
        (Fp8PerTensorOnlineLinearMethod, "activation_quant_key", keys[0 if per_token else 1]),
        (deep_gemm.DeepGemmQuantScaleFMT, "_oracle_cache", _scale_format(machine)),
        (deep_gemm, "_get_mk_alignment_for_contiguous_layout_impl", lambda: 128),
        # Collecting garbage twice a load would be most of the time it takes.
        (base_loader, "gc", SimpleNamespace(collect=lambda: 0)),
    ]


def _answers(machine: Machine) -> Iterator[tuple[Any, str, Any]]:
    """Functions that look for a library, wherever they have been imported to."""
    has_flashinfer, has_deep_gemm = "flashinfer" in machine.has, _has_deep_gemm(machine)
    answers = {
        deep_gemm.is_deep_gemm_supported: lambda: has_deep_gemm,
        deep_gemm.is_deep_gemm_e8m0_used: lambda: has_deep_gemm and _e8m0(),
        deep_gemm.has_deep_gemm: lambda: has_deep_gemm,
        deep_gemm.transform_sf_into_required_layout: _transform_sf(machine),
        flashinfer.has_flashinfer: lambda: has_flashinfer,
        flashinfer.has_flashinfer_trtllm_fused_moe: lambda: has_flashinfer,
        flashinfer.has_flashinfer_cutlass_fused_moe: lambda: has_flashinfer,
        flashinfer.is_flashinfer_fp8_blockscale_gemm_supported: lambda: (
            has_flashinfer and machine.capability == 90
        ),
    }
    for module, name, function in _uses(len(sys.modules), tuple(answers)):
        yield module, name, answers[function]


@functools.lru_cache(maxsize=1)
def _uses(_: int, functions: tuple[Any, ...]) -> list[tuple[ModuleType, str, Any]]:
    """Where these functions are called from; looked for again when there are more modules."""
    return [use for use in _globals(FunctionType | _CACHED) if use[2] in functions]


def _has_deep_gemm(machine: Machine) -> bool:
    return "deep_gemm" in machine.has and machine.capability // 10 in (9, 10, 12)


def _flashinfer() -> dict[str, Any]:
    """Opaque: the order of rows that FlashInfer's kernels by TensorRT-LLM want."""
    package, utils = ModuleType("flashinfer"), ModuleType("flashinfer.utils")
    rows = {"get_shuffle_matrix_a_row_indices": lambda x, tile: torch.arange(len(x)).flip(0)}
    vars(utils).update(rows)
    return {"flashinfer": package, "flashinfer.utils": utils}


def _rocm(machine: Machine) -> dict[str, Any]:
    """Which AMD GPU it is; vLLM's own module asks a driver that is not here."""
    module = ModuleType("vllm.platforms.rocm")
    chips = {94: "on_gfx942", 95: "on_gfx950"}
    questions = ("on_gfx942", "on_gfx950", "on_gfx12x", "on_gfx1250", "on_gfx9", "on_mi3xx")
    for question in questions:
        answer = question == chips.get(machine.capability)
        vars(module)[question] = functools.partial(bool, answer)
    vars(module)["get_cdna_version"] = lambda: 3
    return {module.__name__: module} if machine.enum == PlatformEnum.ROCM else {}


def _scale_format(machine: Machine) -> Any:
    formats = deep_gemm.DeepGemmQuantScaleFMT
    if not _has_deep_gemm(machine) or not _e8m0():
        return formats.FLOAT32
    return formats.UE8M0 if machine.capability >= 100 else formats.FLOAT32_CEIL_UE8M0


def _e8m0() -> bool:
    return bool(vllm.envs.VLLM_USE_DEEP_GEMM_E8M0)


def gptq_marlin_repack(
    b_q_weight: Tensor,
    size_k: int,
    size_n: int,
    num_bits: int,
    perm: Tensor | None = None,
    **_: Any,
) -> Tensor:
    """Marlin's repack, by vLLM's own reference for its tests of the operation."""
    packed: Tensor = _marlin_reference(b_q_weight, size_k, size_n, num_bits)
    return packed


def machete_prepack_B(  # as vLLM calls it
    b_q_weight: Tensor, a_type: torch.dtype, b_type: Any, group_scales_type: torch.dtype | None
) -> Tensor:
    """Opaque: other bytes, in memory of its own that is contiguous, as the operation's are."""
    packed: Tensor = _mixed(b_q_weight)
    return packed


@torch.library.custom_op("flashquant_tests::mixed", mutates_args=())
def _mixed(words: Tensor) -> Tensor:
    mixed = words.contiguous().flip(0)
    return mixed ^ (mixed >> 7)


@torch.library.custom_op("flashquant_tests::marlin_reference", mutates_args=())
def _marlin_reference(b_q_weight: Tensor, size_k: int, size_n: int, num_bits: int) -> Tensor:
    """One operation to those who watch, like the one it stands for."""
    from vllm.model_executor.layers.quantization.utils import marlin_utils_test as reference

    # Codes of a column in one int32, least significant first.
    shifts = torch.arange(0, 32, num_bits, dtype=torch.int32).view(1, -1, 1)
    codes = (b_q_weight.unsqueeze(1) >> shifts) & ((1 << num_bits) - 1)
    codes = codes.reshape(size_k, size_n)
    packed: Tensor = reference.marlin_weights(
        codes, size_k, size_n, num_bits, reference.get_weight_perm(num_bits)
    )
    return packed


def _transform_sf(machine: Machine) -> Any:
    """Opaque: DeepGEMM's layout of scales, which on Hopper is the one they come in."""

    def transform(
        sf: Tensor, mn: int, k: int, recipe: Any, num_groups: int, is_sfa: bool = False
    ) -> Tensor:
        if machine.capability < 100:
            return sf
        rows = sf.repeat_interleave(recipe[1], dim=-2)[..., :mn, :]
        exponents = rows.contiguous().view(torch.int32) >> 23
        return exponents.transpose(-1, -2).contiguous().transpose(-1, -2)

    return transform
