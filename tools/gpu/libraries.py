"""Do vLLM's compiled libraries load, and compute what torch computes?

    python -m tools.gpu.libraries [--device cpu]

On a CPU, only whether they load.
"""

from __future__ import annotations

import argparse
import time
from collections.abc import Callable, Iterator
from functools import cached_property
from typing import Any

import torch
from torch import Tensor

from tools.gpu.telling import guarded, tell

_OPS = (
    "cutlass_scaled_mm",
    "cutlass_scaled_mm_supports_fp8",
    "dynamic_per_token_scaled_fp8_quant",
    "dynamic_scaled_fp8_quant",
    "dynamic_scaled_int8_quant",
    "gptq_marlin_repack",
    "rms_norm",
    "silu_and_mul",
)
_TILE = 128
_FP8 = torch.float8_e4m3fn
_FP8_MAX = 448.0


def main() -> None:
    """Look at each."""
    parser = argparse.ArgumentParser(prog="python -m tools.gpu.libraries")
    parser.add_argument("--device", default="cuda")
    on_gpu = parser.parse_args().device == "cuda"
    guarded("import", lambda: _import(on_gpu=on_gpu))
    if on_gpu and torch.cuda.is_available():
        for name, look in Looks().all():
            guarded(name, look)
    elif on_gpu:
        tell("gpu", "torch sees no GPU here", "fails")


def _import(*, on_gpu: bool) -> str:
    began = time.perf_counter()
    import vllm
    import vllm._custom_ops
    from vllm.platforms import current_platform

    missing = [name for name in _OPS if not hasattr(torch.ops._C, name)]
    if missing and on_gpu:
        raise ImportError(f"torch.ops._C lacks {', '.join(missing)}")
    seconds = time.perf_counter() - began
    return f"vllm {vllm.__version__} on {type(current_platform).__name__}, in {seconds:.0f} s"


def near(result: Tensor, wanted: Tensor, within: float) -> str:
    """How far off, relative to the norm.

    Raises:
        ArithmeticError: further than is allowed.

    """
    off = ((result.float() - wanted.float()).norm() / wanted.float().norm()).item()
    if not off < within:
        raise ArithmeticError(f"off by {off:.3g} of torch's result, where {within} is allowed")
    return f"off by {off:.1e} of torch's"


class Looks:
    """Each kernel that the schemes need, beside torch in float32."""

    def all(self) -> Iterator[tuple[str, Callable[[], str]]]:
        yield "rms_norm", self.norm
        yield "cutlass int8", self.int8
        yield "cutlass fp8", self.fp8
        yield "cutlass fp8 blocks", self.blocks
        yield "flash attention 3", self.attention
        yield "experts by triton", self.experts
        yield "marlin, compiled from PTX", self.marlin

    @cached_property
    def _x(self) -> Tensor:
        return _random(96, 512)

    @cached_property
    def _weight(self) -> Tensor:
        return _random(256, 512)

    @cached_property
    def _product(self) -> Tensor:
        return self._x.float() @ self._weight.float().t()

    def norm(self) -> str:
        from vllm import _custom_ops as ops

        out, ones = torch.empty_like(self._x), torch.ones_like(self._x[0])
        ops.rms_norm(out, self._x, ones, 1e-6)
        wanted = torch.nn.functional.rms_norm(self._x, (512,), ones, 1e-6)
        return near(out, wanted, 0.01)

    def int8(self) -> str:
        from vllm import _custom_ops as ops

        return self._multiplied(lambda rows: ops.scaled_int8_quant(rows)[:2])

    def fp8(self) -> str:
        from vllm import _custom_ops as ops

        return self._multiplied(
            lambda rows: ops.scaled_fp8_quant(rows, use_per_token_if_dynamic=True)
        )

    def _multiplied(self, quantize: Callable[[Tensor], Any]) -> str:
        from vllm import _custom_ops as ops

        (a, a_scale), (b, b_scale) = quantize(self._x), quantize(self._weight)
        result = ops.cutlass_scaled_mm(a, b.t(), a_scale, b_scale, torch.bfloat16)
        return near(result, self._product, 0.06)

    def blocks(self) -> str:
        from vllm import _custom_ops as ops
        from vllm.model_executor.layers.quantization.utils.fp8_utils import (
            per_token_group_quant_fp8,
        )

        tiles = self._weight.float().view(2, _TILE, 4, _TILE)
        scale = tiles.abs().amax((1, 3)) / _FP8_MAX
        codes = (tiles / scale[:, None, :, None]).to(_FP8).view(256, 512)
        a, a_scale = per_token_group_quant_fp8(
            self._x, _TILE, column_major_scales=True, use_ue8m0=False
        )
        result = ops.cutlass_scaled_mm(a, codes.t(), a_scale, scale.t(), torch.bfloat16)
        return near(result, self._product, 0.06)

    def attention(self) -> str:
        from vllm.vllm_flash_attn import flash_attn_varlen_func

        said = []
        ends = torch.tensor([0, 80], dtype=torch.int32, device="cuda")
        for head in (64, 128):
            qkv = [_random(80, 4, head) for _ in range(3)]
            out = flash_attn_varlen_func(
                *qkv,
                max_seqlen_q=80,
                cu_seqlens_q=ends,
                max_seqlen_k=80,
                cu_seqlens_k=ends,
                causal=True,
                fa_version=3,
            )
            heads_first = [tensor.transpose(0, 1)[None] for tensor in qkv]
            wanted = torch.nn.functional.scaled_dot_product_attention(*heads_first, is_causal=True)
            said.append(f"heads of {head} {near(out, wanted[0].transpose(0, 1), 0.02)}")
        return ", ".join(said)

    def experts(self) -> str:
        from vllm import _custom_ops as ops
        from vllm.model_executor.layers.fused_moe.fused_moe import fused_experts

        up, down = _random(8, 256, 512) / 20, _random(8, 512, 128) / 20
        weights = torch.empty(96, 2, device="cuda")
        ids = torch.empty(96, 2, dtype=torch.int32, device="cuda")
        ops.topk_softmax(weights, ids, torch.empty_like(ids), torch.rand(96, 8, device="cuda"))
        out = fused_experts(self._x, up, down, weights, ids)
        return near(out, self._by_expert(up, down, weights, ids), 0.03)

    def _by_expert(self, up: Tensor, down: Tensor, weights: Tensor, ids: Tensor) -> Tensor:
        wanted = torch.zeros_like(self._x, dtype=torch.float32)
        for slot in range(ids.shape[1]):
            for expert in range(len(up)):
                rows = ids[:, slot] == expert
                gate, linear = (self._x[rows].float() @ up[expert].float().t()).chunk(2, -1)
                made = (torch.nn.functional.silu(gate) * linear) @ down[expert].float().t()
                wanted[rows] += weights[rows, slot, None] * made
        return wanted

    def marlin(self) -> str:
        """A kernel without machine code for a Hopper: the driver compiles it."""
        from vllm import _custom_ops as ops

        codes = torch.randint(0, 1 << 30, (512 // 4, 256), dtype=torch.int32, device="cuda")
        no_order = torch.empty(0, dtype=torch.int32, device="cuda")
        packed = ops.gptq_marlin_repack(codes, no_order, 512, 256, 8)
        torch.cuda.synchronize()
        return f"ran: {tuple(packed.shape)}"


def _random(*shape: int) -> Tensor:
    return torch.randn(shape, device="cuda", dtype=torch.bfloat16)


if __name__ == "__main__":
    main()
