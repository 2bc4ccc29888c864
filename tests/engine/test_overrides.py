"""Layers in another scheme than the rest of their engine, on the real engine."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any
from unittest import mock

import pytest
import torch
from hypothesis import settings
from torch import nn

import flashquant
from flashquant.errors import ConfigError, MisfitTensor, UnsupportedEngine
from flashquant.sender import Sender
from flashquant.update import UndoLog
from tests.engine import faults
from tests.engine.kernels import want_int4
from tests.engine.serving import FP8_CHANNEL, GPT_OSS, Serving, choosing, same_bits, serve
from tests.engine.test_doors import DOORS, Weights
from tools.models.policies import W8A8, Policies

pytestmark = [pytest.mark.engine, FP8_CHANNEL]

DOWN = "model.layers.{}.mlp.down_proj"
EACH = 9 if settings.default.max_examples > 100 else 1  # places of each fault
MIXES: dict[str, dict[str, Any]] = {
    "int8 + fp8_channel": {
        "fn": "int8",
        "overrides": [{"match": "*.down_proj", "fn": "fp8_channel"}],
    },
    "fp8_channel + int4 + fp8_tensor": {
        "fn": "fp8_channel",
        "overrides": [
            {"match": "*.down_proj", "fn": "int4"},
            {"match": "*.o_proj", "fn": "fp8_tensor"},
        ],
        "keep": ["model.layers.0.mlp.down_proj"],
    },
    "int4_g32 + nvfp4 + int8": {
        "fn": "int4_g32",
        "overrides": [
            {"match": "model.layers.0.self_attn", "fn": "nvfp4"},
            {"match": {"last": 1}, "fn": "int8"},
        ],
    },
}


@pytest.fixture(scope="module")
def policies(tmp_path_factory: pytest.TempPathFactory) -> Policies:
    return Policies(tmp_path_factory.mktemp("policies"), "qwen2")


def written(folder: Path, **entry: Any) -> str:
    path = folder / f"{abs(hash(repr(entry)))}.yaml"
    path.write_text(json.dumps({"configs": [entry]}))  # JSON is YAML
    return str(path)


@pytest.fixture(scope="module", params=MIXES.values(), ids=MIXES)
def entry(request: pytest.FixtureRequest) -> dict[str, Any]:
    for scheme in (request.param["fn"], *(one["fn"] for one in request.param["overrides"])):
        want_int4(scheme)
    found: dict[str, Any] = request.param
    return found


@pytest.fixture
def live(policies: Policies, entry: dict[str, Any]) -> Serving:
    return serve(policies.bf16("a"), written(policies.folder, **entry))


@pytest.fixture
def fresh(policies: Policies, entry: dict[str, Any]) -> Serving:
    return serve(policies.bf16("b"), written(policies.folder, **entry))


def whole(there: Serving, weights: Weights) -> None:
    flashquant.reload_weights(there.llm, weights)


def prepared(there: Serving, weights: Weights) -> None:
    flashquant.reload_weights(there.llm, weights, prepare=True)


def sent(there: Serving, weights: Weights) -> None:
    flashquant.reload_weights(there.llm, Sender(flashquant.manifest(there.llm)).stream(weights))


def bundled(there: Serving, weights: Weights) -> None:
    flashquant.apply_delta(there.llm, Sender(flashquant.manifest(there.llm)).bundle(weights))


@pytest.mark.parametrize(
    "push", [*DOORS, whole, prepared, sent, bundled], ids=lambda door: door.__name__
)
def test_what_arrives_by_a_door_equals_a_fresh_start(
    live: Serving, fresh: Serving, policies: Policies, push: Any
) -> None:
    push(live, policies.tensors("b"))
    live.snapshot().assert_same(fresh.start)
    push(live, policies.tensors("a"))
    live.snapshot().assert_same(live.start)


def test_each_layer_holds_what_an_engine_of_its_scheme_alone_holds(
    live: Serving, entry: dict[str, Any], policies: Policies
) -> None:
    alone = {scheme: serve(policies.bf16("a"), scheme) for scheme in schemes(entry)}
    held = flashquant.status(live.llm)

    assert set(held.overrides.values()) == set(schemes(entry)) - {entry["fn"]}
    for name, kept in live.start.contents.items():
        module = name.partition("_proj")[0] + "_proj" if "_proj" in name else None
        if module is None or module in held.in_bf16:
            continue
        fused = {"qkv_proj": "q_proj", "gate_up_proj": "gate_proj"}
        last = module.rpartition(".")[2]
        of = f"{module.rpartition('.')[0]}.{fused.get(last, last)}"
        scheme = held.overrides.get(of, entry["fn"])
        wanted = alone[scheme].start.contents[name]
        assert same_bits(kept, wanted), (name, scheme)


MADE_BY = {
    "int8": "CompressedTensorsW8A8Int8",
    "fp8_channel": "CompressedTensorsW8A8Fp8",
    "fp8_tensor": "CompressedTensorsW8A8Fp8",
    "int4": "CompressedTensorsWNA16",
    "int4_g32": "CompressedTensorsWNA16",
    "nvfp4": "CompressedTensorsW4A4Fp4",
}
# By mix: the schemes of o_proj, gate_up_proj and down_proj, block by block.
BUILT = {
    "int8 + fp8_channel": ("int8 int8 fp8_channel", "int8 int8 fp8_channel"),
    "fp8_channel + int4 + fp8_tensor": (
        "fp8_tensor fp8_channel bf16",
        "fp8_tensor fp8_channel int4",
    ),
    "int4_g32 + nvfp4 + int8": ("nvfp4 int4_g32 int4_g32", "int8 int8 int8"),
}


def test_each_layer_is_computed_in_its_scheme(live: Serving, entry: dict[str, Any]) -> None:
    """By what vLLM made of it: kernels do not know what flashquant says."""
    (mix,) = (name for name, one in MIXES.items() if one is entry)
    for block, said in enumerate(BUILT[mix]):
        layers = ("self_attn.o_proj", "mlp.gate_up_proj", "mlp.down_proj")
        for layer, scheme in zip(layers, said.split(), strict=True):
            module: nn.Module = live.model.get_submodule(f"model.layers.{block}.{layer}")
            made = getattr(module, "scheme", None)
            assert type(made).__name__ == MADE_BY.get(scheme, "NoneType"), (block, layer, scheme)


def test_an_update_that_fails_anywhere_leaves_the_old_policy(
    live: Serving, fresh: Serving, policies: Policies, entry: dict[str, Any]
) -> None:
    """By its digest; and the next one goes through. `--hypothesis-profile long`: everywhere."""
    name = " + ".join(schemes(entry))

    assert faults.thrown_at(name, live, fresh, policies, EACH) == []
    live.snapshot().assert_same(live.start)
    with mock.patch.object(UndoLog, "restore", UndoLog.forget):
        assert faults.thrown_at("", live, fresh, policies, 1) != []
    flashquant.reload_weights(live.llm, policies.tensors("a"))
    live.snapshot().assert_same(live.start)


def schemes(entry: dict[str, Any]) -> list[str]:
    return [entry["fn"], *(one["fn"] for one in entry["overrides"])]


def test_a_refused_push_leaves_no_trace(live: Serving, policies: Policies) -> None:
    """NaN in what comes last, when the other schemes' layers have been written."""
    weights = policies.tensors("b")
    name = f"{DOWN.format(1)}.weight"
    broken = {**{n: t for n, t in weights.items() if n != name}, name: weights[name] * torch.nan}

    for prepare in (False, True):
        with pytest.raises(MisfitTensor, match=r"down_proj.*NaN"):
            flashquant.reload_weights(live.llm, broken, prepare=prepare)
        live.snapshot().assert_same(live.start)


def test_status_names_what_is_in_another_scheme(policies: Policies) -> None:
    live = serve(policies.bf16("a"), written(policies.folder, **MIXES["int8 + fp8_channel"]))

    status = flashquant.status(live.llm)

    assert status.scheme == "int8"
    assert status.overrides == dict.fromkeys(map(DOWN.format, (0, 1)), "fp8_channel")
    assert "2 in fp8_channel (model.layers.0.mlp.down_proj" in str(status)


BAD: dict[str, tuple[dict[str, Any], str]] = {
    "no such module": (
        {"fn": "int8", "overrides": [{"match": "*.down_porj", "fn": "fp8_channel"}]},
        r"overrides: '\*\.down_porj' matches no module.*mlp\.down_proj",
    ),
    "a part of a layer": (
        {"fn": "int8", "overrides": [{"match": "*.q_proj", "fn": "int4"}]},
        r"q_proj is to be in int4 and k_proj is not, but vLLM computes both in qkv_proj",
    ),
    "nothing that is quantized": (
        {"fn": "int8", "overrides": [{"match": "*layernorm", "fn": "fp8_channel"}]},
        r"nothing that is matched for fp8_channel is quantized.*input_layernorm",
    ),
    "embeddings": (
        {"fn": "int8", "overrides": [{"match": "*.embed_tokens", "fn": "int4"}]},
        r"has model\.embed_tokens in it, which holds embeddings",
    ),
}


@pytest.mark.parametrize(("entry", "says"), BAD.values(), ids=BAD)
def test_what_vllm_would_pass_over_is_refused_by_name(
    policies: Policies, entry: dict[str, Any], says: str
) -> None:
    for one in entry["overrides"]:
        want_int4(one["fn"])
    with pytest.raises(ConfigError, match=says):
        _ = Serving(policies.bf16("a"), written(policies.folder, **entry)).llm


@pytest.fixture(scope="module")
def mixture(tmp_path_factory: pytest.TempPathFactory) -> Policies:
    return Policies(tmp_path_factory.mktemp("mixture"), "qwen3-moe")


@pytest.mark.parametrize(
    ("fn", "experts"), [("int8", "int4"), ("int8", "fp8_channel"), ("fp8_channel", "nvfp4")]
)
def test_experts_in_a_scheme_that_no_kernel_has_here_are_refused_by_its_name(
    mixture: Policies, fn: str, experts: str
) -> None:
    config = written(mixture.folder, fn=fn, overrides=[{"match": "*.experts", "fn": experts}])

    with choosing("amx"), pytest.raises(UnsupportedEngine, match=rf"mlp\.experts.*in {experts} \("):
        _ = Serving(mixture.bf16("a"), config).llm


@pytest.mark.parametrize("entry", ["experts", "rest"])
def test_experts_may_be_in_another_scheme_than_the_rest(mixture: Policies, entry: str) -> None:
    """Int8 beside fp8_channel, of which vLLM's kernels for CPUs have experts in int8 alone."""
    asked = {
        "experts": {"fn": "fp8_channel", "overrides": [{"match": "*.experts", "fn": "int8"}]},
        "rest": {"fn": "int8", "overrides": [{"match": "*.self_attn", "fn": "fp8_channel"}]},
    }
    config = written(mixture.folder, **asked[entry])
    with choosing("amx"):  # vLLM has its experts in int8 for no other
        live, fresh = (serve(mixture.bf16(policy), config, "amx") for policy in "ab")
        flashquant.reload_weights(live.llm, mixture.tensors("b"))
        live.snapshot().assert_same(fresh.start)
        broken = mixture.tensors("a")
        broken["model.layers.1.mlp.experts.3.down_proj.weight"][3, 5] = torch.nan
        with pytest.raises(MisfitTensor, match=r"experts\.3\.down_proj.*NaN"):
            flashquant.reload_weights(live.llm, broken)
        live.snapshot().assert_same(fresh.start)
        flashquant.reload_weights(live.llm, mixture.tensors("a"))
        live.snapshot().assert_same(live.start)

    other = flashquant.status(live.llm).overrides
    assert set(other.values()) == {asked[entry]["overrides"][0]["fn"]}
    assert all((".experts" in name) == (entry == "experts") for name in other)


def test_a_quantized_checkpoint_has_no_overrides(policies: Policies) -> None:
    config = written(policies.folder, **MIXES["int8 + fp8_channel"])
    with pytest.raises(ConfigError, match="overrides are for bf16 checkpoints"):
        _ = Serving(policies.served("a", W8A8), config).llm


@GPT_OSS
def test_names_are_those_of_the_checkpoint_where_vllm_has_others(tmp_path: Path) -> None:
    """GPT-OSS: `self_attn` is `attn` in vLLM."""
    policies = Policies(tmp_path, "gpt-oss")
    other = [{"match": "*.self_attn.o_proj", "fn": "fp8_channel"}]
    config = written(tmp_path, fn="int8", keep=["*.experts"], overrides=other)
    live, fresh = (serve(policies.bf16(policy), config) for policy in "ab")

    flashquant.reload_weights(live.llm, policies.tensors("b"))

    live.snapshot().assert_same(fresh.start)
    assert {name.rpartition(".")[2] for name in flashquant.status(live.llm).overrides} == {"o_proj"}
