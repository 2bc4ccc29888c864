"""What an engine on a GPU has decided when it serves; what stands in for one is in `layouts`."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from flashquant.errors import UnsupportedEngine
from flashquant.patches import engine
from flashquant.patches.layers import blueprint
from flashquant.patches.seams.loading import session_of
from flashquant.schemes import fp8_channel, fp8_tensor, int8_channel
from tools.layouts import models
from tools.layouts.cases import BLACKWELL, HOPPER
from tools.layouts.machine import Machine, pretending
from tools.models.policies import Policies, config_name


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("policies")


def started(folder: Path, scheme: str, kind: str = "qwen2", device: str = "cpu") -> nn.Module:
    checkpoint = Policies(folder, kind).served("a", scheme)
    config = models.configured(checkpoint, config_name(scheme))
    config.device_config.device = torch.device(device)
    return models.load(HOPPER, config)


@pytest.mark.parametrize("scheme", ["int8", "fp8_block"])
def test_layers_call_their_device_what_their_tensors_call_it(scheme: str, folder: Path) -> None:
    """vLLM says `cuda`; here `cpu:0` is as unequal to the device of any tensor."""
    live = started(folder, scheme, device="cpu:0")

    where = session_of(live)._engine
    assert where.device == next(live.parameters()).device
    for layer in where.layers:
        assert {layer.device} >= {tensor.device for _, tensor in layer.tensors()}


@pytest.mark.parametrize(
    ("scheme", "quantizers"),
    [("int8", (int8_channel,)), ("fp8_channel", (fp8_channel,)), ("fp8_vllm", (fp8_tensor,))],
)
def test_what_pushes_launch_is_compiled_before_the_engine_serves(
    scheme: str, quantizers: Any, folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    warmed: list[Any] = []
    monkeypatch.setattr(engine, "warm", lambda *asked: warmed.append(asked))

    started(folder, scheme)

    assert warmed == [(quantizers, torch.bfloat16, torch.device("cpu"))]


@pytest.mark.parametrize("scheme", ["fp8_vllm", "fp8_channel"])
def test_experts_are_quantized_right_into_the_memory_that_kernels_read(
    scheme: str, folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """No twin of them is processed, in which vLLM would take one expert after another."""
    live = started(folder, scheme, "qwen3-moe")
    pushed = Policies(folder, "qwen3-moe").tensors("b")
    monkeypatch.setattr(blueprint.LayerBlueprint, "build", None)

    with pretending(HOPPER):
        live.load_weights((name, each) for name, each in pushed.items() if ".experts." in name)

    layers = session_of(live)._engine.layers
    assert {layer.placement for layer in layers if layer.name.endswith("experts")} == {"direct"}
    (home,) = [
        each
        for name, each in models.tensors(live).items()
        if ".layers.1." in name and name.endswith(".w2_weight")
    ]
    quantize = fp8_tensor if scheme == "fp8_vllm" else fp8_channel
    codes, _ = quantize(pushed["model.layers.1.mlp.experts.3.down_proj.weight"])
    assert torch.equal(home[3].view(torch.uint8), codes.view(torch.uint8))


def test_int8_on_blackwell_says_what_is_missing(folder: Path) -> None:
    """CUTLASS would refuse at the first token; where there is no other, the start does."""
    others = ("TritonInt8ScaledMMLinearKernel", "HummingInt8ScaledMMLinearKernel")
    machine: Machine = dataclasses.replace(BLACKWELL, without=others)
    config = models.configured(Policies(folder, "qwen2").served("a", "int8"), "int8")

    with pytest.raises(UnsupportedEngine, match="no int8 for compute capability 100"):
        models.load(machine, config)
