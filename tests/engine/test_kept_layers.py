"""Layers that a user leaves in bf16, and starts that fail in one layer: which, and what helps."""

from __future__ import annotations

import logging
import re
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import GraniteMoeConfig, GraniteMoeForCausalLM

import flashquant
from flashquant.config.schemes import W8A8
from flashquant.errors import ConfigError, UnsupportedEngine
from tests.engine.serving import Serving, serve
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


REFUSED = {
    "another scheme": (
        {"quantization_config": {"linear": "fp8_per_channel_static"}},
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
        _ = Serving(policies.bf16("a"), "fp8_channel", ASKED["hf_overrides"]).llm


@pytest.fixture
def odd(tmp_path: Path) -> Path:
    """A model whose MLP has a width that few kernels hold."""
    return tiny_models.make("qwen2", 0, tmp_path / "odd", intermediate=108)


@pytest.mark.parametrize("scheme", ["fp8_vllm", "fp8_block"])
def test_a_start_that_fails_names_the_layer_and_what_helps(odd: Path, scheme: str) -> None:
    """Refused by name, or, on a machine whose kernels hold it, started."""
    said = ""
    try:
        _ = Serving(odd, scheme).llm
    except UnsupportedEngine as refused:
        said = str(refused)

    if "down_proj" in said:
        kept = {"quantization_config": {"ignore": ["re:.*down_proj.*"]}}
        _ = Serving(odd, scheme, kept).llm
    if said:  # without AMX, vLLM has no kernel for blocks: the first layer is refused
        assert re.match(r"model\.layers\.0\.\S*_proj \(", said)
        assert f"served in {scheme}" in said
        assert re.search(r"'ignore': \['re:\.\*\S*_proj", said)


def test_a_loader_without_a_place_for_scales_is_refused_by_the_name_of_the_weight(
    tmp_path: Path,
) -> None:
    """GraniteMoE's renames experts by the end of their names, and knows no others.

    Where vLLM has no int8 kernel for experts, they are refused for that before.
    """
    config = GraniteMoeConfig(
        vocab_size=1000,
        hidden_size=256,
        intermediate_size=256,
        num_hidden_layers=1,
        num_attention_heads=4,
        num_key_value_heads=2,
        num_local_experts=4,
        num_experts_per_tok=2,
        bos_token_id=None,
        eos_token_id=None,
        pad_token_id=None,
    )
    GraniteMoeForCausalLM(config).bfloat16().save_pretrained(tmp_path)

    with pytest.raises(UnsupportedEngine, match=r"input_linear\.weight becomes codes|experts"):
        _ = Serving(tmp_path, "int8").llm
