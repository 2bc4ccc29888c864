"""Where a model can be smoothed: found by running it, whatever its names are."""

from __future__ import annotations

import importlib.util
from typing import Any

import pytest
import torch
import transformers
from torch import nn

from flashquant.profiles.making import Site
from flashquant.profiles.making.discovery import find_sites, kind_of, linear_layers

TOKENS = torch.arange(24).view(1, -1)
SMALL = {
    "vocab_size": 200,
    "hidden_size": 64,
    "intermediate_size": 128,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 64,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 2,
}
ALL_HEADS: dict[str, Any] = {"num_key_value_heads": 4}
HEADS_OF_16 = {"head_dim": 16}
OPT = {"ffn_dim": 128, "word_embed_proj_dim": 64}

QKV = "q_proj, k_proj, v_proj"
LLAMA = {
    "input_layernorm": QKV,
    "post_attention_layernorm": "gate_proj, up_proj",
    "up_proj": "down_proj",
}
GEMMA2 = {
    "1 + input_layernorm": QKV,
    "1 + pre_feedforward_layernorm": "gate_proj, up_proj",
    "up_proj": "down_proj",
}
FUSED = {"post_attention_layernorm": "gate_up_proj", "gate_up_proj[128:256]": "down_proj"}
GLM4 = {"input_layernorm": QKV, **FUSED}
PHI3 = {"input_layernorm": "qkv_proj", **FUSED}
NEOX = {"input_layernorm": "query_key_value", "post_attention_layernorm": "dense_h_to_4h"}
OPT_SITES = {
    "self_attn_layer_norm": QKV,
    "final_layer_norm": "fc1",
    "v_proj": "out_proj",
    "fc1": "fc2",
}
ARCHITECTURES = [
    ("Llama", {}, LLAMA),
    ("Qwen2", {}, LLAMA),
    ("Qwen3", HEADS_OF_16, LLAMA),
    ("Mistral", {}, LLAMA),
    ("Gemma", HEADS_OF_16, {("1 + " if "norm" in k else "") + k: v for k, v in LLAMA.items()}),
    ("Gemma2", HEADS_OF_16, GEMMA2),
    ("Phi3", {}, PHI3),
    ("Glm4", HEADS_OF_16, GLM4),
    # One norm feeds attention and MLP; and where every head has a value, values can be divided.
    ("Phi", ALL_HEADS, {"input_layernorm": f"{QKV}, fc1", "v_proj": "dense"}),
    # A ReLU lets positive factors through.
    (
        "OPT",
        OPT,
        {
            "self_attn_layer_norm": QKV,
            "final_layer_norm": "fc1",
            "v_proj": "out_proj",
            "fc1": "fc2",
        },
    ),
    ("GPTNeoX", {}, NEOX),
    # Its norms come after the layers: what these read is nobody's output alone.
    ("Olmo2", {}, {"up_proj": "down_proj"}),
]


def as_transformers_has_it(config: Any) -> type[nn.Module]:
    """The class of a model, from its source: vLLM wraps those that it serves as they are, for good,
    and an engine of this process may have."""
    known = transformers.AutoModelForCausalLM._model_mapping[type(config)]
    spec = importlib.util.find_spec(known.__module__)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    found: type[nn.Module] = getattr(module, known.__name__)
    return found


def tiny(architecture: str, options: dict[str, Any]) -> Any:
    """A random decoder of transformers, its norms and biases random, too."""
    config = getattr(transformers, f"{architecture}Config")(**{**SMALL, **options})
    torch.manual_seed(0)
    model = as_transformers_has_it(config)(config).float().eval()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.uniform_(0.5, 1.5) if parameter.dim() == 1 else parameter.normal_(0, 0.06)
    return model


def short(name: str) -> str:
    return name.removesuffix(".weight").removesuffix(".bias").rpartition(".")[2]


def in_words(site: Site) -> tuple[str, str]:
    maker = site.producers[0]
    whole = (maker.start, maker.stop) in ((0, 64), (0, 128))
    part = "" if whole else f"[{maker.start}:{maker.stop}]"
    return (
        f"{'1 + ' if maker.offset else ''}{short(maker.name)}{part}",
        ", ".join(map(short, site.consumers)),
    )


@pytest.mark.parametrize(("architecture", "options", "expected"), ARCHITECTURES)
def test_every_block_has_the_same_sites(architecture, options, expected):
    sites = find_sites(tiny(architecture, options), TOKENS)

    assert dict(map(in_words, sites)) == expected
    assert len(sites) == 2 * len(expected)
    for site in sites:
        names = [producer.name for producer in site.producers] + list(site.consumers)
        assert len({name.partition("layers.")[2][0] for name in names}) == 1


def test_a_bias_is_divided_with_its_weight():
    sites = find_sites(tiny("OPT", OPT), TOKENS)

    (fc,) = (site for site in sites if site.consumers == ("model.decoder.layers.0.fc2.weight",))
    made = [producer.name for producer in fc.producers]
    assert made == ["model.decoder.layers.0.fc1.weight", "model.decoder.layers.0.fc1.bias"]


def test_looking_changes_no_weight():
    model = tiny("Qwen2", {})
    before = {name: value.clone() for name, value in model.state_dict().items()}

    find_sites(model, TOKENS)

    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())


def test_a_norm_that_somebody_else_reads_too_is_left_alone():
    model = tiny("Llama", {})
    for layer in model.model.layers:
        attention = layer.self_attn
        plain = attention.forward

        def forward(hidden_states: torch.Tensor, *args: Any, plain: Any = plain, **kwargs: Any):
            out, *rest = plain(hidden_states, *args, **kwargs)
            return out + 0.1 * hidden_states, *rest

        attention.forward = forward

    assert "input_layernorm" not in dict(map(in_words, find_sites(model, TOKENS)))


def test_the_head_is_not_among_the_layers():
    names = {kind_of(name) for name in linear_layers(tiny("Llama", {}))}

    assert "lm_head" not in names
    assert "model.layers.*.mlp.down_proj" in names


class Twisted(nn.Module):
    """A model whose two layers have the same widths, and nothing to do with each other."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.second = nn.Linear(8, 8), nn.Linear(8, 8)

    def forward(self, input_ids: torch.Tensor) -> Any:
        x = nn.functional.one_hot(input_ids % 8, 8).float()
        logits = self.first(x).tanh() + self.second(x * x + 1)
        return transformers.modeling_outputs.CausalLMOutput(logits=logits)


def test_a_candidate_that_changes_the_logits_is_no_site():
    torch.manual_seed(0)

    assert find_sites(Twisted(), TOKENS) == []
