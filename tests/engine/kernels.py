"""Which of vLLM's CPU kernels this machine has, and which of them an engine gets.

`tests.support.isa` says what the CPU is, or pretends to be; here is what follows from it.
"""

from __future__ import annotations

import functools
import inspect
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from typing import Any
from unittest import mock

import pytest
import torch

from tests.support import isa
from tests.support.gpu import HAS_GPU

WORKER_KERNELS = "WORKER_KERNELS"  # for `choosing`, in the workers of a program
NO_AMX_KERNELS = "vLLM has no AMX kernels in its build for CPUs without AVX512-BF16"


MULTIPLIES_FP8 = pytest.mark.skipif(isa.breaks_fp8(), reason=isa.FP8_IS_LOST)


def has_amx_kernels() -> bool:
    """Whether vLLM's build for this CPU has them: for one with AVX512-BF16, they run on that."""
    from vllm import _custom_ops  # noqa: F401  (loads the build that fits this CPU)

    return hasattr(torch.ops._C, "convert_weight_packed")


def multiplies_int4() -> bool:
    """Whether vLLM's build for this machine has a kernel of four bits: for a CPU, not each has."""
    if HAS_GPU:
        return True
    from vllm import _custom_ops  # noqa: F401  (loads the build that fits this CPU)

    return hasattr(torch.ops._C, "cpu_gemm_wna16")


def want_int4(scheme: str) -> None:
    """Skip a test of a scheme of four bits on a CPU for which vLLM has no kernel of it."""
    if scheme.startswith("int4") and not multiplies_int4():
        pytest.skip("vLLM has no kernel of four bits in its build for CPUs without AVX-512")


def packs_heads() -> bool:
    """Whether vLLM packs a copy of a bf16 head, in whatever kernel it takes for it."""
    return torch.cpu._is_avx512_supported()


@contextmanager
def choosing(kernels: str) -> Iterator[None]:
    """Make vLLM choose its CPU linears as on a machine with, or without, AMX.

    Args:
        kernels: `native` as this machine chooses; `amx` and `portable` make the
            capability checks of vLLM's CPU linears answer yes and no. (Without AMX
            the AMX kernels run on AVX-512: slower, from the same bytes.)

    """
    if kernels == "native":
        yield
        return
    if kernels == "amx" and not has_amx_kernels():
        pytest.skip(NO_AMX_KERNELS)
    from vllm.model_executor.kernels.linear.scaled_mm import cpu
    from vllm.model_executor.layers import utils

    def check(n: int, k: int, dtype: torch.dtype) -> bool:
        return kernels == "amx" and k % 32 == 0 and n % 16 == 0 and dtype != torch.float16

    answer = (kernels == "amx", None if kernels == "amx" else "the test says there is no AMX")
    with ExitStack() as stack:
        for module in (cpu, utils):
            stack.enter_context(mock.patch.object(module, "check_cpu_sgl_kernel", check))
        for name in ("CPUFp8PerTensorScaledMMLinearKernel", "CPUFp8BlockScaledMMKernel"):
            if (kernel := getattr(cpu, name, None)) is not None:  # the first, since 0.31
                says = classmethod(lambda *_: answer)
                stack.enter_context(mock.patch.object(kernel, "is_supported", says))
        stack.enter_context(_experts_and_mla(kernels == "amx"))
        yield


@contextmanager
def _experts_and_mla(has_amx: bool) -> Iterator[None]:
    """The same for experts of codes, and for the attention that DeepSeek has.

    Not for experts in bf16: their kernel has AMX instructions of its own.
    """
    from vllm.platforms import cpu as platform

    try:
        from vllm.model_executor.layers.fused_moe.experts import cpu_moe
    except ImportError:  # until 0.31
        yield
        return
    with ExitStack() as stack:
        for name in ("CPUExpertsInt8", "CPUExpertsFp8"):
            if (experts := getattr(cpu_moe, name, None)) is not None:
                says = staticmethod(lambda: has_amx)
                stack.enter_context(mock.patch.object(experts, "_supports_current_device", says))
        stack.enter_context(mock.patch.object(platform, "torch", _Torch(has_amx)))
        yield


class _Torch:
    """torch as the platform sees it, on a machine with or without AMX."""

    def __init__(self, has_amx: bool) -> None:
        self.cpu = _TorchCpu(has_amx)

    def __getattr__(self, name: str) -> Any:
        return getattr(torch, name)


class _TorchCpu:
    def __init__(self, has_amx: bool) -> None:
        self._is_amx_tile_supported = lambda: has_amx

    def __getattr__(self, name: str) -> Any:
        return getattr(torch.cpu, name)


def mind_the_map_of_experts() -> None:
    """Let vLLM's CPU kernels serve the experts of one rank, in this process.

    They take the numbers that all ranks know experts by for places in what this rank holds, and
    read beyond its end: with expert parallelism, the first batch ends the process or is answered
    from whatever lies there. Here they are handed the places, and a weight of 0 for others'.
    """
    from vllm.model_executor.layers.fused_moe.experts import cpu_moe

    for name in ("CPUUnquantizedExperts", "CPUExpertsInt8", "CPUExpertsFp8"):
        experts = getattr(cpu_moe, name, None)
        # Until 0.29, they are told by a router of their own.
        if experts is not None and "topk_ids" in inspect.signature(experts.apply).parameters:
            experts.apply = _by_place(experts.apply)


def make_room_between_stages() -> None:
    """Let vLLM's CPU worker serve a stage of a pipeline, in this process.

    It makes the room for what comes from the stage before in the profiling run, which its CPU
    worker leaves out, and then fails at the first batch. Here there is room after the load.
    """
    from vllm.distributed.parallel_state import get_pp_group
    from vllm.v1.worker.cpu_model_runner import CPUModelRunner

    load = CPUModelRunner.load_model

    @functools.wraps(load)
    def with_room(self: Any, *args: Any, **kwargs: Any) -> None:
        load(self, *args, **kwargs)
        if not get_pp_group().is_first_rank:
            self.intermediate_tensors = self.model.make_empty_intermediate_tensors(
                batch_size=self.max_num_tokens, dtype=self.dtype, device=self.device
            )

    CPUModelRunner.load_model = with_room


def _by_place(apply: Any) -> Any:
    @functools.wraps(apply)
    def by_place(
        self: Any, *, topk_ids: Any, topk_weights: Any, expert_map: Any, **others: Any
    ) -> None:
        if expert_map is not None:
            places = expert_map[topk_ids.long()]
            topk_weights = topk_weights.masked_fill(places < 0, 0)
            topk_ids = places.clamp(min=0).to(topk_ids.dtype)
        apply(
            self,
            topk_ids=topk_ids,
            topk_weights=topk_weights,
            expert_map=expert_map,
            **others,
        )

    return by_place
