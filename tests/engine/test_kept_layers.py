"""Layers that a user leaves in bf16, and starts that fail in one layer: which, and what helps."""

from __future__ import annotations

import json
import logging
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import settings
from torch import Tensor

import flashquant
from flashquant.config.schemes import W8A8
from flashquant.errors import ConfigError, MisfitTensor, UnsupportedEngine
from tests.engine import faults
from tests.engine.kernels import want_int4
from tests.engine.serving import BY_ROW, GPT_OSS, INT8_EXPERTS, Serving, choosing, serve
from tools.models import tiny_models
from tools.models.policies import Policies

pytestmark = pytest.mark.engine

DOWN = "model.layers.0.mlp.down_proj.weight"
ASKED = {
    "an argument": {"quantization_config": {"ignore": ["re:.*down_proj.*"]}},
    "an argument with wildcards": {"quantization_config": {"ignore": ["*down_proj*"]}},
    "hf_overrides": {
        "hf_overrides": {"quantization_config": {**W8A8, "ignore": ["lm_head", "re:.*down_proj.*"]}}
    },
}


def one_tensor_a_call(live: Serving, weights: dict[str, Tensor]) -> None:
    for name, tensor in weights.items():
        live.model.load_weights([(name, tensor)])


def one_iterator(live: Serving, weights: dict[str, Tensor]) -> None:
    live.model.load_weights(iter(weights.items()))


def whole_update(live: Serving, weights: dict[str, Tensor]) -> None:
    flashquant.reload_weights(live.llm, weights)


def prepared(live: Serving, weights: dict[str, Tensor]) -> None:
    flashquant.reload_weights(live.llm, weights, prepare=True)


@pytest.fixture(scope="module")
def policies(tmp_path_factory: pytest.TempPathFactory) -> Policies:
    return Policies(tmp_path_factory.mktemp("policies"), "qwen2")


@pytest.mark.parametrize("options", ASKED.values(), ids=ASKED)
def test_int8_leaves_in_bf16_what_it_is_asked_to(
    policies: Policies, options: dict[str, Any], caplog: pytest.LogCaptureFixture
) -> None:
    """At the first load and at every push; and the log says so."""
    with caplog.at_level(logging.INFO, "flashquant"):
        live = serve(policies.bf16("a"), "int8", **options)
    fresh = serve(policies.bf16("b"), "int8", **options)

    flashquant.reload_weights(live.llm, policies.tensors("b"))

    live.snapshot().assert_same(fresh.start)
    kept = {name: t for name, t in live.session._engine.targets.items() if "mlp" in name}
    assert kept[DOWN].dtype == torch.bfloat16
    assert kept["model.layers.0.mlp.gate_up_proj.weight"].dtype == torch.int8
    assert any(
        "are not quantized" in message and "down_proj" in message for message in caplog.messages
    )


EACH = 9 if settings.default.max_examples > 100 else 1  # places of each fault
KEEPS = ["lm_head", "*.down_proj", {"first": 1}]
SERVED = ("int8", "fp8_vllm", "fp8_channel", "fp8_tensor", "fp8_block", "int4", "mxfp8", "nvfp4")


def written(folder: Path, **entry: Any) -> str:
    """What FLASHRL_CONFIG says of a file with one entry."""
    path = folder / f"{abs(hash(repr(entry)))}.yaml"
    path.write_text(json.dumps({"configs": [entry]}))  # JSON is YAML
    return str(path)


@pytest.fixture(scope="module")
def configs(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("configs")


@pytest.fixture(params=SERVED)
def keeping(
    request: pytest.FixtureRequest, policies: Policies, configs: Path
) -> Iterator[tuple[Serving, Serving]]:
    """Engines on A and on B, kept, that keep the first block and every down_proj in bf16."""
    if request.param in ("fp8_channel", "fp8_tensor") and BY_ROW != "fp8_channel":
        pytest.skip("this vLLM has no online fp8 by channel")
    want_int4(request.param)
    config = written(configs, fn=request.param, keep=KEEPS)
    # vLLM has its blocks of fp8 for AMX alone; its kernels for it run on AVX-512, too.
    with choosing("amx" if request.param == "fp8_block" else "native"):
        live, fresh = (serve(policies.bf16(policy), config) for policy in "ab")
        yield live, fresh


def test_what_is_kept_is_pushed_as_it_comes_and_equals_a_start(
    keeping: tuple[Serving, Serving], policies: Policies
) -> None:
    """By every door that tests of one engine have: a tensor, an iterator, a bracket."""
    live, fresh = keeping
    b, a = policies.tensors("b"), policies.tensors("a")
    for push in (one_tensor_a_call, one_iterator, whole_update, prepared):
        push(live, b)
        live.snapshot().assert_same(fresh.start)
        push(live, a)
        live.snapshot().assert_same(live.start)


def test_a_refused_push_of_what_is_kept_leaves_no_trace(
    keeping: tuple[Serving, Serving], policies: Policies
) -> None:
    live, _ = keeping
    broken = {**policies.tensors("b"), DOWN: policies.tensors("b")[DOWN] * float("nan")}

    with pytest.raises(MisfitTensor, match=r"down_proj.*NaN"):
        flashquant.reload_weights(live.llm, broken)

    live.snapshot().assert_same(live.start)


def test_an_update_that_fails_anywhere_leaves_the_old_policy(
    keeping: tuple[Serving, Serving], policies: Policies
) -> None:
    """By its digest; and the next one goes through. `--hypothesis-profile long`: everywhere."""
    live, fresh = keeping

    assert (
        faults.thrown_at(f"{live.session._engine.scheme}, kept", live, fresh, policies, EACH) == []
    )
    live.snapshot().assert_same(live.start)


def test_status_lists_what_is_kept(keeping: tuple[Serving, Serving]) -> None:
    linear = ("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj", "self_attn.o_proj")
    linear += ("mlp.gate_proj", "mlp.up_proj", "mlp.down_proj")
    first = {f"model.layers.0.{module}" for module in linear}

    status = flashquant.status(keeping[0].llm)

    assert set(status.in_bf16) == {*first, "model.layers.1.mlp.down_proj"}
    assert "8 kept in bf16 (model.layers.0" in str(status)


def test_nothing_else_is_kept(keeping: tuple[Serving, Serving]) -> None:
    """Layers of the same kind: the second block has codes, the first has what was sent."""
    model = keeping[0].model
    methods = {
        name: type(module.quant_method).__name__
        for name, module in model.named_modules()
        if name.endswith("_proj")
    }

    kept = {name for name, method in methods.items() if method == "UnquantizedLinearMethod"}
    assert {name for name in methods if ".layers.0." in name} < kept
    assert kept - {name for name in methods if ".layers.0." in name} == {
        "model.layers.1.mlp.down_proj"
    }


PARTS = {
    "shards of a fused layer": (
        "qwen2",
        ["*.q_proj"],
        r"model\.layers\.0\.self_attn\.qkv_proj.*Keep .*, or none",
    ),
    "no such module": ("qwen2", ["*.down_porj"], r"matches no module.*mlp\.down_proj"),
}


@pytest.mark.parametrize("scheme", ["int8", "fp8_vllm"])
@pytest.mark.parametrize(("kind", "keep", "says"), PARTS.values(), ids=PARTS)
def test_what_cannot_be_kept_is_refused_by_name(
    scheme: str, kind: str, keep: list[str], says: str, tmp_path: Path
) -> None:
    policies = Policies(tmp_path, kind)
    with pytest.raises(ConfigError, match=says):
        _ = Serving(policies.bf16("a"), written(tmp_path, fn=scheme, keep=keep)).llm


@pytest.mark.parametrize(
    ("keep", "says"),
    [
        ("*.experts.0", r"keep: .*experts\.0\.\S+ stays in bf16 and .*experts\.1\.\S+ does not"),
        pytest.param(
            "*.experts.1", r"keep: vLLM quantizes .*experts\.1\..* all the same", marks=INT8_EXPERTS
        ),
    ],
)
def test_one_expert_of_a_layer_cannot_be_kept(keep: str, says: str, tmp_path: Path) -> None:
    policies = Policies(tmp_path, "qwen3-moe")
    with choosing("amx"), pytest.raises(ConfigError, match=says):
        _ = Serving(policies.bf16("a"), written(tmp_path, fn="int8", keep=[keep])).llm


@pytest.mark.parametrize(
    ("scheme", "keep"),
    [
        ("int8", ["*.experts"]),
        pytest.param("int8", ["router"], marks=INT8_EXPERTS),
        ("fp8_vllm", ["*.experts"]),
    ],
    ids=str,
)
def test_experts_are_kept_whole_and_routers_anyway(
    scheme: str, keep: list[str], tmp_path: Path
) -> None:
    """So a model is served whose experts have no kernel in a scheme, as in fp8_vllm here."""
    policies = Policies(tmp_path, "qwen3-moe")
    with choosing("amx"):  # vLLM has its experts in int8 for no other
        config = written(tmp_path, fn=scheme, keep=keep)
        live, fresh = (serve(policies.bf16(policy), config, "amx") for policy in "ab")
        flashquant.reload_weights(live.llm, policies.tensors("b"))
        live.snapshot().assert_same(fresh.start)

    kept = flashquant.status(live.llm).in_bf16
    assert kept
    assert all(keep[0].strip("*.") in name or name.endswith("gate") for name in kept)


@GPT_OSS
@pytest.mark.parametrize("scheme", ["int8", "fp8_vllm"])
def test_names_are_those_of_the_checkpoint_where_vllm_has_others(
    scheme: str, tmp_path: Path
) -> None:
    """GPT-OSS: `self_attn` is `attn` in vLLM; its experts have no kernel here but that of bf16."""
    policies = Policies(tmp_path, "gpt-oss")
    config = written(tmp_path, fn=scheme, keep=["*.experts", "*.self_attn.o_proj"])
    live, fresh = (serve(policies.bf16(policy), config) for policy in "ab")

    flashquant.reload_weights(live.llm, policies.tensors("b"))

    live.snapshot().assert_same(fresh.start)
    kept = {name for name, why in flashquant.status(live.llm).in_bf16.items() if why == "keep"}
    assert {name.rpartition(".")[2] for name in kept} == {"experts", "o_proj"}


@pytest.mark.parametrize("scheme", ["fp8_tensor", "fp8_channel"])
def test_a_list_of_flashrl_quantizes_what_it_lists_and_keeps_the_rest(
    scheme: str, policies: Policies, tmp_path: Path
) -> None:
    """Its configuration as `flashrl setup` writes it, but for the load format and the executor."""
    listed = [name for name in policies.tensors("a") if ".mlp." in name]
    torch.save(listed, tmp_path / "profile.pt")
    config = written(tmp_path, fn=scheme, profile=str(tmp_path / "profile.pt"))
    live, fresh = (serve_by_channel(policies.bf16(policy), config, scheme) for policy in "ab")

    flashquant.reload_weights(live.llm, policies.tensors("b"))

    live.snapshot().assert_same(fresh.start)
    kept = flashquant.status(live.llm).in_bf16
    assert {name.split(".")[-2] for name in kept} == {"self_attn"}
    assert len(kept) == 8


def serve_by_channel(checkpoint: Path, config: str, scheme: str) -> Serving:
    if BY_ROW != "fp8_channel":
        pytest.skip(f"this vLLM is not asked for {scheme}")
    return serve(checkpoint, config)


REFUSED = {
    "another scheme": (
        {"quantization_config": {"linear": "fp8_per_tensor_static"}},
        "int8.*quantization_config with linear",
    ),
    "another method": (
        {"hf_overrides": {"quantization_config": {"quant_method": "fp8"}}},
        r"is quantized already \(fp8",
    ),
}


@pytest.mark.parametrize(("options", "says"), REFUSED.values(), ids=REFUSED)
def test_what_int8_cannot_honour_is_refused_by_name(
    policies: Policies, options: dict[str, Any], says: str
) -> None:
    with pytest.raises(ConfigError, match=says):
        _ = Serving(policies.bf16("a"), "int8", options).llm


def test_an_online_scheme_takes_no_config_of_a_checkpoint(policies: Policies) -> None:
    with pytest.raises(ConfigError, match=r"quantization_config=\{'ignore'"):
        _ = Serving(policies.bf16("a"), "fp8_vllm", ASKED["hf_overrides"]).llm


@pytest.fixture
def odd(tmp_path: Path) -> Path:
    """A model whose MLP has a width that few kernels hold."""
    return tiny_models.make("qwen2", 0, tmp_path / "odd", intermediate=108)


@pytest.mark.parametrize("scheme", ["fp8_vllm", "fp8_block"])
def test_a_start_that_fails_names_the_layer_and_what_helps(odd: Path, scheme: str) -> None:
    """One layer after the other is kept, as the refusal says, until the model starts."""
    kept: list[str] = []
    for _ in range(5):  # without AMX, all four layers of a block are refused for blocks of fp8
        try:
            _ = Serving(odd, scheme, {"quantization_config": {"ignore": kept}}).llm
        except UnsupportedEngine as refused:
            said = str(refused)
            assert re.match(r"model\.layers\.0\.\S*_proj \(", said)
            assert f"cannot be served in {scheme}" in said
            pattern = re.search(r"'ignore': \['(re:\.\*\S*_proj\S*)'", said)
            assert pattern
            kept.append(pattern[1])
        else:
            return
    raise AssertionError(f"refused with all layers in bf16: {kept}")
