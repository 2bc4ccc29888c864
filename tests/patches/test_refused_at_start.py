"""What could not be made anew when weights are pushed is refused by name, before it serves.

And what has to be learned of a layer is learned then. On a pretended GPU: `tools.layouts.machine`.
"""

from __future__ import annotations

from contextlib import nullcontext
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import nn
from vllm.config import WeightTransferConfig
from vllm.model_executor.layers.quantization.compressed_tensors.compressed_tensors import (
    CompressedTensorsLinearMethod,
)
from vllm.model_executor.layers.quantization.online import fp8 as online
from vllm.model_executor.models.qwen2 import Qwen2ForCausalLM, Qwen2MLP
from vllm.model_executor.offloader import PrefetchOffloader

from flashquant.errors import ConfigError, UnsupportedEngine
from flashquant.patches import engine
from flashquant.patches.decided import ADDITIONAL_CONFIG_KEY
from flashquant.patches.layers import probe
from flashquant.patches.seams import loading
from tools.layouts import models
from tools.layouts.cases import AMPERE, HOPPER, Case
from tools.layouts.layout import load
from tools.layouts.machine import pretending
from tools.models.policies import Policies

METHODS = {
    "fp8_channel": online.Fp8PtpcOnlineLinearMethod,
    "int8": CompressedTensorsLinearMethod,
}


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("policies")


@pytest.mark.parametrize("loader", ["tensorizer_loader", "weight_cache.ipc_loader"])
def test_a_loader_that_brings_processed_weights_is_refused(loader: str, folder: Path) -> None:
    """It creates the model itself: pushes would go past flashquant, and be cast to int8."""
    module = pytest.importorskip(f"vllm.model_executor.model_loader.{loader}")
    config = models.configured(Policies(folder, "qwen2").bf16("a"), "int8")

    with pytest.raises(UnsupportedEngine, match=r"load_format=.*would not be quantized"):
        module.initialize_model(vllm_config=config)


def test_weights_that_vllm_copies_from_the_host_for_each_step_are_refused(
    folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """What is live of them is a buffer that layers share, overwritten by the next step."""

    class Offloader(PrefetchOffloader):
        def __init__(self) -> None:
            """Without a GPU's streams."""

        def wrap_modules(self, modules_generator: Any, prefix: str = "") -> list[nn.Module]:
            return list(modules_generator)

    case = Case(HOPPER, "int8", "", "")
    monkeypatch.setattr("vllm.model_executor.offloader.base._instance", Offloader())

    with pytest.raises(UnsupportedEngine, match=r"on the host.*offload_group_size"):
        load(case, folder, "a", "int8")


def test_a_score_that_vllm_makes_of_a_head_is_refused(folder: Path) -> None:
    """Rerankers: it is made once, while lm_head is loaded, and no push brings it."""
    path = Policies(folder, "qwen2").bf16("a")
    generates, pools = (models.configured(path, "int8") for _ in range(2))
    for config in (generates, pools):
        config.model_config.hf_config.classifier_from_token = ["no", "yes"]
    pools.model_config.runner_type = "pooling"

    models.load(HOPPER, generates)
    with pytest.raises(UnsupportedEngine, match=r"of lm_head .*classifier_from_token"):
        models.load(HOPPER, pools)


@pytest.mark.parametrize("scheme", METHODS)
def test_a_method_that_keeps_something_out_of_sight_is_refused(
    scheme: str, folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """It would be served as it was at the start, whatever is pushed."""
    process = METHODS[scheme].process_weights_after_loading

    def and_keep(method: Any, layer: nn.Module) -> None:
        method.kept = {"double": layer.weight.float() * 2}
        process(method, layer)

    monkeypatch.setattr(METHODS[scheme], "process_weights_after_loading", and_keep)
    case = Case(HOPPER, scheme, "", "")

    load(case, folder, "a", None)
    with pytest.raises(
        UnsupportedEngine, match=r"qkv_proj\.weight \(QKVParallelLinear, .*made of it is kept where"
    ):
        load(case, folder, "a", scheme)


@pytest.mark.parametrize(
    ("kind", "named"),
    [(Qwen2MLP, r"model\.layers\.0\.mlp \(Qwen2MLP\)"), (Qwen2ForCausalLM, "the model")],
)
@pytest.mark.parametrize("scheme", ["bf16", "fp8_channel"])
def test_a_module_that_processes_its_weights_itself_is_refused(
    kind: Any, named: str, scheme: str, folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As models of experts do that have kernels of their own."""

    def derive(module: nn.Module) -> None:
        """Of weights that are in; vLLM's models call it when their loader is done."""

    monkeypatch.setattr(kind, "process_weights_after_loading", derive, raising=False)

    with pytest.raises(UnsupportedEngine, match=f"^{named} .*go stale"):
        load(Case(HOPPER, scheme, "", ""), folder, "a", scheme)


def test_experts_that_move_are_refused(folder: Path) -> None:
    checkpoint = Policies(folder, "qwen3-moe").bf16("a")

    with pytest.raises(ConfigError, match="enable_eplb=True moves experts"):
        models.configured(checkpoint, "fp8_vllm", enable_eplb=True)


def test_nothing_is_learned_of_twins_once_the_engine_serves(
    folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """By then, the cache has taken the memory that a second set of experts would need."""
    case = Case(AMPERE, "fp8_vllm", "MarlinExperts", "packed", kind="qwen3-moe")
    live = load(case, folder, "a", "fp8_vllm")

    def learn(*_: Any) -> None:
        raise AssertionError("a twin was looked at")

    monkeypatch.setattr(probe, "memory_layouts", learn)
    with pretending(AMPERE):
        live.load_weights(Policies(folder, "qwen3-moe").tensors("b").items())


@pytest.mark.parametrize("scheme", ["fp8_vllm", "fp8_channel"])
def test_experts_find_their_scales_without_a_word_to_other_ranks(
    scheme: str, folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A rank that fails alone would leave the others waiting in it."""
    case = Case(HOPPER, scheme, "", "", kind="qwen3-moe")
    fresh = load(case, folder, "b", scheme)
    monkeypatch.setattr(engine, "_cuts_weights", lambda _: True)
    live = load(case, folder, "a", scheme)
    among_ranks, asked = online.amax_for_moe_weight_quant, []

    def of_two_ranks(amax: torch.Tensor, _: int) -> torch.Tensor:
        asked.append(amax)
        return among_ranks(amax, 2)

    def wait(*_: Any, **__: Any) -> None:
        raise AssertionError("this rank waits for the others")

    monkeypatch.setattr(online, "amax_for_moe_weight_quant", of_two_ranks)
    monkeypatch.setattr(torch.distributed, "all_reduce", wait)
    with pretending(HOPPER):
        live.load_weights(Policies(folder, "qwen3-moe").tensors("b").items())

    assert asked
    mine, theirs = models.tensors(live), models.tensors(fresh)
    assert [n for n in mine if not torch.equal(mine[n].float(), theirs[n].float())] == []


@pytest.mark.parametrize("backend", ["sparse_nccl", "sharded_rdt", "modelexpress"])
def test_transfers_that_bring_nothing_to_quantize_are_refused(folder: Path, backend: str) -> None:
    checkpoint = Policies(folder, "qwen2").bf16("a")

    with pytest.raises(ConfigError, match=f"backend='{backend}'.*Use 'nccl'"):
        models.configured(
            checkpoint, "int8", weight_transfer_config=WeightTransferConfig(backend=backend)
        )


def test_a_transfer_that_writes_itself_is_refused_where_it_does(folder: Path) -> None:
    """vLLM's nccl_m2n hands tensors to the loader of a quantized model, and of pipeline stages."""
    checkpoint = Policies(folder, "qwen2").bf16("a")
    transfer = {"weight_transfer_config": WeightTransferConfig(backend="nccl_m2n")}

    with pytest.raises(ConfigError, match=r"backend='nccl_m2n'.*itself.*Use 'nccl'"):
        models.configured(checkpoint, "bf16", **transfer)
    models.configured(checkpoint, "int8", **transfer)


@pytest.mark.parametrize("asked", [True, False])
def test_a_loader_that_creates_the_model_itself_is_refused(asked: bool) -> None:
    """As that of modelexpress, a package: no session would look after the model."""
    worker = SimpleNamespace(
        vllm_config=SimpleNamespace(
            additional_config={ADDITIONAL_CONFIG_KEY: {"scheme": "int8"}} if asked else {},
            load_config=SimpleNamespace(load_format="modelexpress"),
        ),
        get_model=lambda: nn.Linear(2, 2),
    )
    refusal = pytest.raises(UnsupportedEngine, match=r"load_format='modelexpress'.*past flashquant")

    with refusal if asked else nullcontext():
        loading._load_model(lambda _, **__: None, worker, load_dummy_weights=False)
