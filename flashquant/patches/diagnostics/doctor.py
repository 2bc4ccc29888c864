"""Is this machine one on which flashquant does what it promises? Looked at, not believed.

versions    what is installed, and whether it is what was tested
seams       every point that would be patched: there, in shape, and free
hardware    what the CPU and the GPUs can do
schemes     what each one asks vLLM for
kernels     each quantization against its definition, bit for bit, on every device
"""

from __future__ import annotations

import os
import platform
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial
from typing import Literal

import torch
import vllm
from torch import Tensor
from vllm import _custom_ops as ops
from vllm.platforms import current_platform

from flashquant import patches
from flashquant.config import env
from flashquant.config.schemes import COMPRESSED, SCHEMES, Scheme
from flashquant.errors import PatchError
from flashquant.patches import guard
from flashquant.patches.seams import engine_args
from flashquant.patches.seams.emulation import is_emulated
from flashquant.schemes import DEFINITIONS, has_groups

Verdict = Literal["ok", "skipped", "fails"]
_WORDS = 400  # shown of what a kernel raises
Quantize = Callable[[Tensor], tuple[Tensor, Tensor]]


@dataclass(frozen=True)
class Finding:
    """One thing that was looked at."""

    topic: str
    name: str
    verdict: Verdict
    detail: str


def examine() -> list[Finding]:
    """Look at everything; nothing is patched, and nothing is left behind."""
    return [*_versions(), *_seams(), *_hardware(), *_schemes(), *_kernels()]


def _versions() -> Iterator[Finding]:
    yield Finding("versions", "python", "ok", platform.python_version())
    yield Finding("versions", "torch", "ok", torch.__version__)
    try:
        guard.check_version(vllm.__version__)
    except PatchError as refusal:
        yield Finding("versions", "vllm", "fails", str(refusal))
    else:
        yield Finding("versions", "vllm", "ok", f"{vllm.__version__} ({guard.tested_range()})")


def _seams() -> Iterator[Finding]:
    for point in patches.POINTS:
        if patches.is_patched():
            yield Finding("seams", point.target, "skipped", "is patched at the moment")
            continue
        try:
            point.check()
        except PatchError as refusal:
            yield Finding("seams", point.target, "fails", str(refusal))
        else:
            yield Finding("seams", point.target, "ok", "fits")
    for point in patches.ELSEWHERE:
        try:
            point.check_absent()
        except PatchError as refusal:
            yield Finding("seams", point.target, "fails", str(refusal))


def _hardware() -> Iterator[Finding]:
    features = {
        "AVX2": torch.cpu._is_avx2_supported(),
        "AVX-512": torch.cpu._is_avx512_supported(),
        "AMX": torch.cpu._is_amx_tile_supported(),
    }
    found = ", ".join(name for name, there in features.items() if there) or "none of AVX2 and later"
    yield Finding("hardware", "cpu", "ok", f"{platform.machine()}: {found}")
    for index in range(torch.cuda.device_count()):
        gpu = torch.cuda.get_device_properties(index)
        detail = f"{gpu.name}, compute capability {gpu.major}.{gpu.minor}"
        yield Finding("hardware", f"cuda:{index}", "ok", detail)
    if not torch.cuda.is_available():
        yield Finding("hardware", "cuda", "skipped", "no GPU that torch can see")


def _schemes() -> Iterator[Finding]:
    yield Finding("schemes", "bf16", "ok", "no quantization")
    for scheme in SCHEMES.values():
        if not engine_args.is_served(scheme):
            yield Finding("schemes", scheme.name, "skipped", scheme.instead)
        elif lacking := _lacks_here(scheme):
            yield Finding("schemes", scheme.name, "skipped", lacking)
        elif scheme.online is not None:
            yield Finding("schemes", scheme.name, "ok", f"vLLM's online {scheme.online}")
        elif scheme.name in COMPRESSED:
            layout = COMPRESSED[scheme.name]["format"]
            detail = f"compressed-tensors {layout}, a scale a {scheme.scales}"
            yield Finding("schemes", scheme.name, "ok", detail)


def _lacks_here(scheme: Scheme) -> str:
    """What keeps an engine on this machine from serving a scheme, where that is known."""
    if is_emulated(scheme) and not env.EMULATE.read(os.environ):
        return (
            "vLLM has no kernel of it for CPUs; FLASHQUANT_EMULATE=1 lets it emulate one, slowly, "
            "to try it"
        )
    if scheme.scales == "block" and current_platform.is_cpu():
        return "" if torch.cpu._is_amx_tile_supported() else "vLLM's kernel for CPUs wants AMX"
    return ""


def _kernels() -> Iterator[Finding]:
    weight = _weight()
    devices = ["cpu", *(f"cuda:{index}" for index in range(torch.cuda.device_count()))]
    for device in devices:
        for name, quantize in DEFINITIONS.items():
            for look in (_as_on_the_cpu, _as_vllms):
                yield _looked(f"{name} on {device}", partial(look, name, quantize, weight, device))
        if device != "cpu":
            yield _looked(f"triton on {device}", partial(_triton, device))


def _looked(name: str, look: Callable[[], Finding]) -> Finding:
    """A kernel that does not run is a finding, and the others are still looked at."""
    try:
        return look()
    except Exception as failure:  # whatever a compiler or a device raises
        said = " ".join(str(failure).split())
        return Finding("kernels", name, "fails", f"{type(failure).__name__}: {said}"[:_WORDS])


def _triton(device: str) -> Finding:
    """What is compiled for a GPU returns the bits of the definitions."""
    from flashquant.schemes import fused  # Triton is there with torch for CUDA, not with any other

    try:
        strange = fused.difference(torch.device(device))
    except fused.COMPILE_ERRORS as failure:
        strange = f"cannot be compiled, so torch quantizes instead: {failure}"
    verdict: Verdict = "fails" if strange else "ok"
    return Finding(
        "kernels", f"triton on {device}", verdict, strange or "every code and every scale"
    )


def _as_on_the_cpu(name: str, quantize: Quantize, weight: Tensor, device: str) -> Finding:
    """The definition computes the same bits wherever it runs, and they mean the weight."""
    topic = f"{name} on {device}"
    here, there = quantize(weight), quantize(weight.to(device))
    if not all(_same(one, other.cpu()) for one, other in zip(here, there, strict=True)):
        return Finding("kernels", topic, "fails", "other bits than on the CPU")
    codes, scales = here
    if has_groups(name):
        scales = scales.float().repeat_interleave(weight.shape[1] // scales.shape[1], 1)
    error = (codes.float() * scales - weight.float()).abs() / scales
    coarse = error.max().item()
    if not coarse <= _COARSEST[name]:
        return Finding("kernels", topic, "fails", f"off by {coarse:.2f} steps of its scale")
    return Finding("kernels", topic, "ok", "as defined: about half a step of its codes at most")


def _as_vllms(name: str, quantize: Quantize, weight: Tensor, device: str) -> Finding:
    """What vLLM's own kernel stores on a fresh start is what we store on a reload."""
    topic = f"{name} against vLLM's kernel on {device}"
    if device == "cpu":
        reason = "vLLM has no fp8 kernel for the CPU, and its int8 kernel rounds differently"
        return Finding("kernels", topic, "skipped", f"{reason}; ours are used for both")
    if name not in _VLLMS:
        reason = "vLLM packs codes of four bits, and makes none"
        return Finding("kernels", topic, "skipped", f"{reason}; ours are used for both")
    there = weight.to(device)
    ours, theirs = quantize(there), _VLLMS[name](there)
    different = (ours[0].view(torch.uint8) != theirs[0].view(torch.uint8)).sum().item()
    if different:
        return Finding("kernels", topic, "fails", f"{different} of {weight.numel()} codes differ")
    return _compare_scales(topic, there, ours[1].flatten(), theirs[1].flatten())


def _compare_scales(topic: str, weight: Tensor, ours: Tensor, theirs: Tensor) -> Finding:
    """Codes of zeros mean zeros under any scale, and vLLM's int8 kernel gives a row of them 0."""
    zeros = ~weight.any(dim=1) if len(ours) == len(weight) else torch.zeros_like(ours).bool()
    wrong = (ours != theirs) & ~zeros
    if wrong.any() or ours.dtype != theirs.dtype:
        detail = f"{wrong.sum().item()} of {len(ours)} scales differ"
        return Finding("kernels", topic, "fails", detail)
    detail = "every code and every scale"
    if not _same(ours, theirs):
        detail = "every code, and every scale of rows that are not all zeros"
        detail += f" (theirs of zeros are {theirs[zeros].max().item():g})"
    return Finding("kernels", topic, "ok", detail)


def _weight() -> Tensor:
    """Rows of very different sizes, zeros among them; an odd shape, so that no tile fits, but
    groups do."""
    dice = torch.Generator().manual_seed(0)
    weight = torch.randn(131, 384, generator=dice, device="cpu")
    weight *= torch.logspace(-6, 2, 131, device="cpu")[:, None]
    weight[7] = 0
    return weight.bfloat16()


def _same(one: Tensor, other: Tensor) -> bool:
    return one.dtype == other.dtype and torch.equal(one.view(torch.uint8), other.view(torch.uint8))


def _vllms_by_tensor(weight: Tensor) -> tuple[Tensor, Tensor]:
    codes, scale = ops.scaled_fp8_quant(weight)
    return codes, scale.reshape(1, 1).expand(len(weight), 1).contiguous()


# Half a step of an integer; half of the widest step of e4m3, which is 32 at 448.
_COARSEST = {"int8": 0.51, "fp8_channel": 16.01, "fp8_tensor": 16.01, "fp8_vllm": 16.01}
# The same of four bits, whose scales are rounded to bf16: 7.5 of them may be 7.53.
_COARSEST |= {name: 0.54 for name in DEFINITIONS if has_groups(name)}
_VLLMS: dict[str, Quantize] = {
    "int8": lambda weight: ops.scaled_int8_quant(weight)[:2],
    "fp8_channel": lambda weight: ops.scaled_fp8_quant(weight, use_per_token_if_dynamic=True),
    "fp8_tensor": _vllms_by_tensor,
    "fp8_vllm": lambda weight: ops.scaled_fp8_quant(weight),
}
