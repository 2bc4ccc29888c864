"""Every kernel that vLLM can choose for one of our schemes, and a machine on which it does.

Kernels that are never somebody's first choice are reached by switching others off, as
VLLM_DISABLED_KERNELS does.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from typing import Any

from vllm.platforms.interface import PlatformEnum

from tools.layouts.machine import Machine

_BOTH = frozenset({"flashinfer", "deep_gemm"})

AMPERE = Machine("Ampere", 80)
ADA = Machine("Ada", 89)
HOPPER = Machine("Hopper", 90)
BLACKWELL = Machine("Blackwell", 100)
RTX_BLACKWELL = Machine("Blackwell RTX", 120)


@dataclass(frozen=True)
class Case:
    """One kernel class, on one machine, for one scheme.

    Attributes:
        scheme: as in `tools.models.policies`: what FLASHRL_CONFIG says, or a checkpoint
            that holds codes.
        kernel: the class that vLLM chooses.
        weight: how the weight is stored, by `flashquant.patches.layers.memory_layout`.
        kind: of the tiny model; the widths of `odd` are no multiples of 16, those of `odd-k`
            only of 8, on the side that is summed over.
        options: more engine arguments.
        opaque: the stand-in that packs, where it does not give the bytes that the device would.

    """

    machine: Machine
    scheme: str
    kernel: str
    weight: str
    kind: str = "qwen2"
    opaque: str = ""
    options: Mapping[str, Any] = field(default_factory=dict)

    @property
    def parameter(self) -> str:
        """The one that `weight` is about."""
        return "w13_weight" if self.kind == "qwen3-moe" else "weight"

    @property
    def id(self) -> str:
        return f"{self.machine.name}-{self.scheme}-{self.kernel}-{self.kind}".replace(" ", "_")


def _off(machine: Machine, *kernels: str) -> Machine:
    return replace(machine, without=kernels)


def _with(machine: Machine, **settings: Any) -> Machine:
    return replace(machine, settings=settings)


HOPPER_ALL, BLACKWELL_ALL, RTX_ALL = (
    replace(machine, has=_BOTH) for machine in (HOPPER, BLACKWELL, RTX_BLACKWELL)
)
_DEEP_GEMM = "deep_gemm.transform_sf_into_required_layout"
_CUTLASS_INT8, _CUTLASS_FP8 = "CutlassInt8ScaledMMLinearKernel", "CutlassFP8ScaledMMLinearKernel"
_TRITON_INT8 = "TritonInt8ScaledMMLinearKernel"  # CUTLASS has none from Blackwell on
_MARLIN, _CUTLASS_BLOCK = "MarlinFP8ScaledMMLinearKernel", "CutlassFp8BlockScaledMMKernel"
_MARLIN_INT4, _MACHETE = "MarlinLinearKernel", "MacheteLinearKernel"
_MARLIN_MXFP8, _MARLIN_NVFP4 = "MarlinMxfp8LinearKernel", "MarlinNvFp4LinearKernel"
_TORCH = "ChannelWiseTorchFP8ScaledMMLinearKernel"

_FP8 = (ADA, HOPPER, BLACKWELL, RTX_BLACKWELL)

LINEAR = (
    *(Case(machine, "int8", _CUTLASS_INT8, "rows") for machine in (AMPERE, ADA, HOPPER)),
    *(Case(machine, "int8", _TRITON_INT8, "rows") for machine in (BLACKWELL, RTX_BLACKWELL)),
    Case(HOPPER, "int8_w8a8", _CUTLASS_INT8, "rows"),
    Case(_off(AMPERE, _CUTLASS_INT8), "int8", _TRITON_INT8, "rows"),
    *(Case(machine, "fp8_vllm", _CUTLASS_FP8, "codes") for machine in _FP8),
    *(Case(machine, "fp8_channel", _CUTLASS_FP8, "codes") for machine in _FP8),
    *(Case(machine, "fp8_channel_stored", _CUTLASS_FP8, "rows") for machine in _FP8),
    *(Case(machine, "fp8_tensor", _CUTLASS_FP8, "rows") for machine in _FP8),
    Case(AMPERE, "fp8_tensor", _MARLIN, "packed"),
    *(Case(machine, "int4", _MARLIN_INT4, "packed") for machine in (AMPERE, ADA, BLACKWELL)),
    Case(_off(HOPPER, _MACHETE), "int4", _MARLIN_INT4, "packed"),
    Case(HOPPER, "int4", _MACHETE, "packed", opaque="machete_prepack_B"),
    # Where FlashInfer or CUTLASS come first, they pack for Blackwell by ops of their own.
    *(Case(machine, "mxfp8", _MARLIN_MXFP8, "packed") for machine in (AMPERE, HOPPER, BLACKWELL)),
    *(Case(machine, "nvfp4", _MARLIN_NVFP4, "packed") for machine in (AMPERE, HOPPER, BLACKWELL)),
    Case(AMPERE, "fp8_vllm", _MARLIN, "packed"),
    Case(AMPERE, "fp8_channel_stored", _MARLIN, "packed"),
    Case(AMPERE, "fp8_block", _MARLIN, "packed"),
    Case(ADA, "fp8_block", _MARLIN, "packed"),
    Case(_off(HOPPER, _CUTLASS_FP8), "fp8_vllm", _TORCH, "codes"),
    Case(_off(HOPPER, _CUTLASS_FP8), "fp8_channel", _TORCH, "codes"),
    Case(_off(HOPPER, _CUTLASS_FP8), "fp8_channel_stored", _TORCH, "rows"),
    Case(
        replace(ADA, cutlass_fp8=False),
        "fp8_vllm",
        "PerTensorTorchFP8ScaledMMLinearKernel",
        "codes",
    ),
    Case(
        replace(BLACKWELL_ALL, cutlass_fp8=False),
        "fp8_vllm",
        "FlashInferFP8ScaledMMLinearKernel",
        "codes",
    ),
    Case(HOPPER_ALL, "fp8_block", "FlashInferFp8DeepGEMMDynamicBlockScaledKernel", "packed"),
    Case(
        replace(HOPPER, has=frozenset({"deep_gemm"})),
        "fp8_block",
        "DeepGemmFp8BlockScaledMMKernel",
        "packed",
    ),
    Case(
        _with(
            replace(HOPPER, name="Hopper without e8m0", has=frozenset({"deep_gemm"})),
            VLLM_USE_DEEP_GEMM_E8M0=False,
        ),
        "fp8_block",
        "DeepGemmFp8BlockScaledMMKernel",
        "packed",
    ),
    *(
        Case(machine, "fp8_block", "DeepGemmFp8BlockScaledMMKernel", "packed", opaque=_DEEP_GEMM)
        for machine in (BLACKWELL_ALL, RTX_ALL)
    ),
    *(Case(m, "fp8_block", _CUTLASS_BLOCK, "packed") for m in (HOPPER, BLACKWELL, RTX_BLACKWELL)),
    Case(_off(ADA, _MARLIN), "fp8_block", "TritonFp8BlockScaledMMKernel", "packed"),
    Case(
        _off(HOPPER, _CUTLASS_BLOCK, _MARLIN, "TritonFp8BlockScaledMMKernel"),
        "fp8_block",
        "BlockWiseTorchFP8ScaledMMLinearKernel",
        "packed",
    ),
)


def _experts(machine: Machine, scheme: str, kernel: str, weight: str, **more: Any) -> Case:
    return Case(machine, scheme, kernel, weight, kind="qwen3-moe", **more)


_TRITON = "TritonExperts"
_TRTLLM = "flashinfer.utils.get_shuffle_matrix_a_row_indices"

EXPERTS = (
    *(_experts(machine, "int8", _TRITON, "rows") for machine in (AMPERE, HOPPER, BLACKWELL)),
    _experts(AMPERE, "fp8_vllm", "MarlinExperts", "packed"),
    _experts(AMPERE, "fp8_block", "MarlinExperts", "packed"),
    *(_experts(machine, "mxfp8", "MarlinExperts", "packed") for machine in (AMPERE, HOPPER)),
    *(_experts(machine, "fp8_vllm", _TRITON, "codes") for machine in _FP8),
    _experts(ADA, "fp8_channel", _TRITON, "codes"),
    _experts(HOPPER, "fp8_channel", "TritonOrCutlassExperts", "codes"),
    _experts(BLACKWELL, "fp8_channel", "TritonOrCutlassExperts", "codes"),
    _experts(RTX_BLACKWELL, "fp8_channel", _TRITON, "codes"),
    *(_experts(machine, "fp8_block", _TRITON, "packed") for machine in _FP8),
    _experts(
        HOPPER_ALL,
        "fp8_block",
        "TritonOrDeepGemmExperts",
        "packed",
        options={"moe_backend": "deep_gemm"},
    ),
    _experts(
        HOPPER_ALL,
        "fp8_block",
        "FlashInferExperts",
        "packed",
        options={"moe_backend": "flashinfer_cutlass"},
    ),
    _experts(BLACKWELL_ALL, "fp8_block", "TrtLlmFp8ExpertsModular", "packed", opaque=_TRTLLM),
    _experts(
        replace(BLACKWELL, has=frozenset({"deep_gemm"})),
        "fp8_block",
        "TritonOrDeepGemmExperts",
        "packed",
        opaque=_DEEP_GEMM,
    ),
)

MI300 = Machine("MI300", 94, enum=PlatformEnum.ROCM, fnuz=True)
MI350 = Machine("MI350", 95, enum=PlatformEnum.ROCM)
_ROW_WISE = "RowWiseTorchFP8ScaledMMLinearKernel"

# What pads, scales or encodes weights on its way.
CORNERS = (
    Case(HOPPER, "fp8_vllm", _CUTLASS_FP8, "codes", kind="odd"),
    Case(HOPPER, "fp8_channel", _CUTLASS_FP8, "codes", kind="odd-k"),
    Case(HOPPER, "fp8_channel_stored", _CUTLASS_FP8, "rows", kind="odd-k"),
    Case(HOPPER, "int8", _CUTLASS_INT8, "rows", kind="odd"),
    Case(HOPPER, "fp8_block", _CUTLASS_BLOCK, "packed", kind="odd"),
    Case(AMPERE, "fp8_vllm", _MARLIN, "packed", kind="odd"),
    Case(MI300, "fp8_channel", _ROW_WISE, "packed"),
    Case(MI300, "fp8_channel_stored", _ROW_WISE, "packed"),
    Case(MI350, "fp8_channel", _ROW_WISE, "codes"),
    Case(MI350, "fp8_channel_stored", _ROW_WISE, "rows"),
    Case(MI350, "fp8_block", "TritonFp8BlockScaledMMKernel", "packed"),
)

# What vLLM itself cannot load, and what it says.
REFUSED = (
    (Case(AMPERE, "fp8_channel", "", ""), "requires a kernel that honors per-token activation"),
    (
        Case(HOPPER, "fp8_channel", _CUTLASS_FP8, "", kind="odd"),
        "Overwriting existing tensor attribute: weight_loader",
    ),
)
