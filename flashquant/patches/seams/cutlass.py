"""int8 where CUTLASS has no kernel for it: vLLM chooses the next one, Triton's.

From Blackwell on (compute capability 10), the tensor cores have no int8 that CUTLASS would use, and
vLLM's `cutlass_scaled_mm` refuses it when the first token is generated. vLLM's choice of a kernel
does not ask for that.
"""

from __future__ import annotations

from typing import Any

from vllm.model_executor.kernels import linear

from flashquant.patches.point import PatchPoint

_FIRST_WITHOUT = 100


def _can_implement(
    original: Any, kernel: type, config: Any, compute_capability: int | None
) -> tuple[bool, str]:
    if kernel is linear.CutlassInt8ScaledMMLinearKernel:
        capability = compute_capability or _capability()
        if capability >= _FIRST_WITHOUT:
            return False, f"{kernel.__name__} has no int8 for compute capability {capability}."
    answer: tuple[bool, str] = original(kernel, config, compute_capability)
    return answer


def _capability() -> int:
    """That of this machine's GPU, as vLLM counts them; 0 without one."""
    found = linear.current_platform.get_device_capability()
    return 0 if found is None else int(found.to_int())


POINTS = (
    PatchPoint(
        "vllm.model_executor.kernels.linear:is_supported_and_can_implement_kernel",
        expects=("kernel", "config", "compute_capability"),
        wrapper=_can_implement,
    ),
)
