"""Schemes of which vLLM has kernels for GPUs only, computed by its emulation on this CPU."""

from __future__ import annotations

import json
import os
from collections.abc import Callable, Iterator
from pathlib import Path
from unittest import mock

import pytest
import torch
from torch import Tensor, nn

import flashquant
from flashquant.errors import ConfigError, MisfitTensor, UnsupportedEngine
from flashquant.patches.diagnostics.examination import engines
from flashquant.patches.diagnostics.examination import policies as checkpoints
from flashquant.patches.guard import vllm_is
from flashquant.patches.seams import emulation
from flashquant.schemes import nvfp4_matrix
from flashquant.sender import Sender
from tests.engine.serving import Serving, same_bits, serve
from tests.engine.test_doors import DOORS, Weights
from tools.models import tiny_models
from tools.models.policies import Policies

pytestmark = pytest.mark.engine

DOWN = "model.layers.1.mlp.down_proj"


@pytest.fixture(scope="module")
def policies(tmp_path_factory: pytest.TempPathFactory) -> Policies:
    return Policies(tmp_path_factory.mktemp("policies"), "qwen2")


@pytest.fixture(scope="module", params=["mxfp8", "nvfp4"])
def live(request: pytest.FixtureRequest, policies: Policies) -> Serving:
    return serve(policies.bf16("a"), request.param)


@pytest.fixture
def there(live: Serving, policies: Policies) -> Iterator[Serving]:
    """One that serves A, before and after."""
    yield live
    flashquant.reload_weights(live.llm, policies.tensors("a"))
    live.snapshot().assert_same(live.start)


def whole(there: Serving, weights: Weights) -> None:
    flashquant.reload_weights(there.llm, weights)


def sent(there: Serving, weights: Weights) -> None:
    flashquant.reload_weights(there.llm, Sender(flashquant.manifest(there.llm)).stream(weights))


@pytest.mark.parametrize("push", [*DOORS, whole, sent], ids=lambda door: door.__name__)
def test_what_arrives_by_a_door_equals_a_fresh_start(
    there: Serving, policies: Policies, push: Callable[[Serving, Weights], None]
) -> None:
    push(there, policies.tensors("b"))

    there.snapshot().assert_same(serve(policies.bf16("b"), there.scheme).start)


def mxfp8(weight: Tensor) -> Tensor:
    """What codes stand for, by the OCP's specification: scales are powers of two."""
    blocks = weight.double().reshape(-1, 32)
    scale = torch.exp2((blocks.abs().amax(-1, keepdim=True) / 448).log2().ceil())
    return (((blocks / scale).to(torch.float8_e4m3fn).double()) * scale).view(weight.shape)


def nvfp4(weight: Tensor) -> Tensor:
    """What the codes of our definition stand for, which is compressed-tensors' (tests/schemes)."""
    packed, scales, divisor = nvfp4_matrix(weight)
    numbers = torch.tensor([0.0, 0.5, 1.0, 1.5, 2.0, 3.0, 4.0, 6.0])
    codes = torch.stack([packed & 15, packed >> 4], -1).long()
    values = torch.cat([numbers, -numbers])[codes].view(-1, 16)
    return (values * (scales.float() * (1 / divisor)).view(-1, 1)).view(weight.shape)


MEANT = {"mxfp8": mxfp8, "nvfp4": nvfp4}


def test_the_kernel_computes_with_what_codes_by_definition_stand_for(
    live: Serving, policies: Policies
) -> None:
    if live.scheme == "mxfp8" and not vllm_is(">=0.27"):  # its codes go up to 2
        pytest.skip("this vLLM has no mxfp8 that uses the range of its codes")
    layer: nn.Module = live.model.get_submodule(DOWN)
    weight = policies.tensors("a")[f"{DOWN}.weight"]
    identity = torch.eye(weight.shape[1], dtype=torch.bfloat16)

    held = layer.quant_method.apply(layer, identity, None).T

    assert torch.equal(held, MEANT[live.scheme](weight).bfloat16())
    assert (held != weight).float().mean() > 0.3


def test_a_refused_push_leaves_no_trace(there: Serving, policies: Policies) -> None:
    for wrong in (torch.nan, torch.inf):
        broken = policies.tensors("b")
        broken[f"{DOWN}.weight"][3, 5] = wrong
        with pytest.raises(MisfitTensor, match=r"down_proj\S* holds NaN"):
            whole(there, broken)
        there.snapshot().assert_same(there.start)


def test_half_a_fused_layer_waits_for_the_rest(there: Serving, policies: Policies) -> None:
    weights = policies.tensors("b")
    first = "model.layers.0.self_attn.q_proj.weight"

    there.model.load_weights([(first, weights.pop(first))])
    there.snapshot().assert_same(there.start)
    there.model.load_weights(iter(weights.items()))

    there.snapshot().assert_same(serve(policies.bf16("b"), there.scheme).start)


def test_no_cpu_emulates_unless_it_is_asked_to(
    live: Serving, policies: Policies, caplog: pytest.LogCaptureFixture
) -> None:
    from vllm.engine.arg_utils import EngineArgs

    name = live.scheme
    unasked = mock.patch.dict(os.environ, FLASHRL_CONFIG=name, FLASHQUANT_EMULATE="0")
    says = rf"no kernel of {name} for CPUs.*EMULATE=1"
    with unasked, pytest.raises(ConfigError, match=says):
        EngineArgs(str(policies.bf16("a"))).create_model_config()
    with caplog.at_level("WARNING", "flashquant"):
        assert emulation.asks_to_emulate(name, {"FLASHQUANT_EMULATE": "1"})
    assert "slower than bf16" in caplog.text
    assert not emulation.asks_to_emulate("int8", {"FLASHQUANT_EMULATE": "1"})


def test_vllms_lists_of_kernels_are_as_they_were(live: Serving) -> None:
    from vllm.model_executor.kernels import linear
    from vllm.platforms import PlatformEnum

    assert live.start
    for kernels in (linear._POSSIBLE_MXFP8_KERNELS, linear._POSSIBLE_NVFP4_KERNELS):
        assert PlatformEnum.CPU not in kernels


def test_a_width_of_no_whole_blocks_is_refused_by_layer(live: Serving, tmp_path: Path) -> None:
    odd = tiny_models.make("qwen2", 0, tmp_path / "odd", intermediate=168)

    with pytest.raises(UnsupportedEngine, match=rf"mlp\.down_proj .*{live.scheme} on.*168"):
        _ = Serving(odd, live.scheme).llm


def written(folder: Path, **entry: object) -> str:
    path = folder / "config.yaml"
    path.write_text(json.dumps({"configs": [entry]}))
    return str(path)


def test_experts_are_refused_by_name_unless_they_are_kept(live: Serving, tmp_path: Path) -> None:
    mixture = Policies(tmp_path, "qwen3-moe")

    with pytest.raises(UnsupportedEngine, match=rf"mlp\.experts.*in {live.scheme} \("):
        _ = Serving(mixture.bf16("a"), live.scheme).llm
    config = written(tmp_path, fn=live.scheme, keep=["*.experts"])
    one, other = (serve(mixture.bf16(policy), config) for policy in "ab")
    whole(one, mixture.tensors("b"))

    one.snapshot().assert_same(other.start)


def test_a_packed_checkpoint_served_by_vllm_alone_holds_what_nvfp4_makes_of_bf16(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    checkpoints.write(tmp_path)
    with monkeypatch.context() as opened:
        opened.setattr(emulation, "emulates", lambda _: True)
        alone = engines._serve(tmp_path / "b-nvfp4", {"enforce_eager": True})
        engines._alive.append(alone)
    ours = serve(tmp_path / "b", "nvfp4")

    held, made = (engines.tensors(llm.apply_model(lambda m: m)[0]) for llm in (alone, ours.llm))
    assert sum(name.endswith("weight_global_scale") for name in made) == 2 * 4
    assert held.keys() == made.keys()
    assert [name for name in made if not same_bits(held[name], made[name])] == []
    assert engines.outputs(alone) == engines.outputs(ours.llm)
