"""One case, looked at: loaded for the machine, pushed to, and compared with vLLM's own load."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from vllm.config.quantization import QuantizationConfigArgs

from flashquant.config.schemes import ONLINE
from flashquant.patches.diagnostics.examination.layouts import kernel_of, stored
from flashquant.patches.layers import MemoryLayout
from flashquant.update import footprints
from flashquant.update.integrity import Footprint
from tools.layouts import models
from tools.layouts.cases import Case
from tools.layouts.machine import pretending
from tools.models import tiny_models
from tools.models.policies import Policies, config_name

# Schemes that vLLM has for checkpoints of codes only: `make_quantized` makes them.
_MADE = ("fp8_tensor", "int4")
_BY_ITSELF = "nvfp4"  # tests/engine/test_emulated.py compares its start with vLLM's of packed codes
_ODD = {"odd": 516, "odd-k": 520}


class Odd(Policies):
    """Of a model in which not everything is a multiple of 16, let alone of 64 or 128."""

    def bf16(self, policy: str) -> Path:
        path = self.folder / f"{self.kind}-{policy}"
        if not path.exists():
            inner = _ODD[self.kind]
            tiny_models.make("qwen2", "ab".index(policy), path, intermediate=inner)
        return path


@dataclass(frozen=True)
class Layout:
    """What one case came to.

    Attributes:
        kernels: the classes that vLLM chose for the layers it quantizes.
        stored: each kind of parameter of the layers that are the case's, by its name in them.
        compared: bytes that kernels would read, all of them equal to vLLM's own load.
        different: the tensors that are not.
        moved: the tensors that are not where they were.

    """

    kernels: frozenset[str]
    stored: Mapping[str, MemoryLayout]
    compared: int
    different: tuple[str, ...]
    moved: tuple[str, ...]


def look(case: Case, folder: Path) -> Layout:
    """Start on A, push B, A and B again; compare with vLLM's own load of B, without flashquant.

    Args:
        case: what to look at.
        folder: where tiny checkpoints are made, or lie already.

    """
    live = load(case, folder, "a", config_name(case.scheme))
    before = footprints(models.tensors(live).items())
    kinds, kernels = _stored(case, live), frozenset(map(kernel_of, live.modules())) - {""}
    for policy in "bab":
        with pretending(case.machine):
            live.load_weights(_policies(case, folder).tensors(policy).items())
    fresh = models.tensors(load(case, folder, "b", None))
    mine = models.tensors(live)
    different = [
        name
        for name in mine.keys() | fresh.keys()
        if name not in mine or name not in fresh or not _same(mine[name], fresh[name])
    ]
    moved = [name for name, tensor in mine.items() if Footprint.of(tensor) != before[name]]
    compared = sum(tensor.nbytes for tensor in fresh.values())
    return Layout(kernels, kinds, compared, tuple(sorted(different)), tuple(moved))


def load(case: Case, folder: Path, policy: str, scheme: str | None) -> nn.Module:
    """With flashquant in a scheme, or as vLLM alone would, from what it calls the same."""
    policies = _policies(case, folder)
    if scheme is None and case.scheme == _BY_ITSELF:
        scheme = case.scheme
    if scheme is not None:
        checkpoint, options = policies.served(policy, case.scheme), {}
    else:
        alike = "int8_w8a8" if case.scheme == "int8" else case.scheme
        checkpoint = (
            _codes(policies, policy, alike) if alike in _MADE else policies.served(policy, alike)
        )
        options = _online(case, ONLINE[alike]) if alike in ONLINE else {}
    return models.load(
        case.machine, models.configured(checkpoint, scheme, **options, **case.options)
    )


def _codes(policies: Policies, policy: str, scheme: str) -> Path:
    """A checkpoint that vLLM alone serves as flashquant serves the bf16 one."""
    source = policies.bf16(policy)
    path = source.with_name(f"{source.name}-{scheme}")
    if not path.exists():
        tiny_models.make_quantized(source, path, scheme)
    return path


def _online(case: Case, quantization: str) -> dict[str, Any]:
    """vLLM alone, told to leave routers in bf16, as flashquant does (`patches/moe.py`)."""
    routers = QuantizationConfigArgs(ignore=["*.mlp.gate"])
    experts = {"quantization_config": routers} if case.kind == "qwen3-moe" else {}
    return {"quantization": quantization, **experts}


def _policies(case: Case, folder: Path) -> Policies:
    return (Odd if case.kind in _ODD else Policies)(folder, case.kind)


def _stored(case: Case, live: nn.Module) -> dict[str, MemoryLayout]:
    """How the parameters of the case's layers are stored; told apart only if they differ."""
    found: dict[str, MemoryLayout] = {}
    with pretending(case.machine):
        layers = list(stored(live))
    for layer, kernel, parameters in layers:
        for name, storage in parameters.items() if kernel == case.kernel else ():
            same = found.setdefault(name, storage).kind == storage.kind
            found |= {} if same else {f"{layer.rpartition('.')[2]}.{name}": storage}
    return found


def _same(one: Tensor, other: Tensor) -> bool:
    if (one.shape, one.stride(), one.dtype) != (other.shape, other.stride(), other.dtype):
        return False
    first, second = (tensor.flatten().contiguous().view(torch.uint8) for tensor in (one, other))
    return torch.equal(first, second)
