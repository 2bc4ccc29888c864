"""Which modules of a checkpoint an entry keeps in bf16."""

from __future__ import annotations

import pytest

from flashquant.config.keep import Blocks, kept_modules
from flashquant.config.schema import RolloutConfig, load_config
from flashquant.errors import ConfigError

DENSE = (
    *(
        f"model.layers.{block}.{module}.weight"
        for block in range(12)
        for module in ("self_attn.q_proj", "self_attn.k_proj", "mlp.down_proj", "input_layernorm")
    ),
    "model.embed_tokens.weight",
    "lm_head.weight",
)
EXPERTS = (
    "model.layers.0.mlp.gate.weight",
    "model.layers.0.mlp.shared_expert_gate.weight",
    "model.layers.0.mlp.shared_expert.up_proj.weight",
    "model.layers.0.mlp.experts.0.up_proj.weight",
    "model.layers.0.self_attn.q_proj.weight",
)
TOWER = tuple(f"model.visual.blocks.{i}.attn.{m}.weight" for i in range(40) for m in "abcd")


def kept(*keep: object, tensors: tuple[str, ...] = DENSE, depth: int | None = None) -> set[str]:
    return set(kept_modules(RolloutConfig(keep=keep).keep, tensors, depth))


def test_a_glob_crosses_dots_and_holds_the_whole_name():
    assert kept("*.down_proj") == {f"model.layers.{i}.mlp.down_proj" for i in range(12)}


def test_a_module_is_kept_with_everything_in_it():
    assert kept("model.layers.1") == {
        f"model.layers.1.{m}"
        for m in ("self_attn.q_proj", "self_attn.k_proj", "mlp.down_proj", "input_layernorm")
    }


@pytest.mark.parametrize(
    ("blocks", "indices"),
    [({"first": 2}, {0, 1}), ({"last": 1}, {11}), ({"first": 12}, set(range(12)))],
)
def test_blocks_are_counted_from_either_end_and_by_number(blocks, indices):
    assert {int(name.split(".")[2]) for name in kept(blocks)} == indices


def test_blocks_are_those_of_the_language_model():
    assert kept({"first": 1}, tensors=TOWER + DENSE) == kept({"first": 1})


def test_what_a_checkpoint_holds_beyond_the_model_is_no_block():
    assert kept({"last": 1}, depth=11) == kept("model.layers.10")


def test_the_router_is_what_stands_beside_experts():
    assert kept("router", tensors=EXPERTS) == {
        "model.layers.0.mlp.gate",
        "model.layers.0.mlp.shared_expert_gate",
    }


def test_the_tower_is_found_by_its_name():
    assert kept("vision", tensors=TOWER + DENSE) == {n.removesuffix(".weight") for n in TOWER}


def test_a_tied_head_is_kept_though_the_checkpoint_has_none():
    assert kept("lm_head") == {"lm_head"}
    assert kept("lm_head", tensors=DENSE[:-1]) == set()


@pytest.mark.parametrize(
    ("wrong", "says"),
    [
        ("*.down_porj", r"'\*\.down_porj' matches no module .*nearest are model\.layers\.\*\.mlp"),
        ("model.layer.3", r"'model\.layer\.3' matches no module"),
        ("*.qkv_proj", r"nearest are model\.layers\.\*\.self_attn\.[qk]_proj"),
        ("router", r"no module of the checkpoint is"),
        ("vision", r"vision or visual in their name, and the checkpoint has none"),
        ({"last": 13}, r"\{last: 13\} is more than the 12 blocks"),
    ],
    ids=str,
)
def test_what_matches_nothing_is_refused_with_what_is_near(wrong, says):
    with pytest.raises(ConfigError, match=says):
        kept("*.q_proj", wrong)


@pytest.mark.parametrize(
    ("written", "says"),
    [
        ("lm_head", r"configs\[0\]\.keep: .*write it as \[first, second\]"),
        ("[{first: 0}]", r"configs\[0\]\.keep: holds \{'first': 0\}; write a name"),
        ("[{frist: 2}]", "holds {'frist': 2}"),
        ("[{first: true}]", "holds {'first': True}"),
        ("[{first: 1, last: 1}]", "with N from 1"),
        ("['']", "holds ''"),
        ("[3]", "holds 3; write a name or a glob"),
    ],
)
def test_what_cannot_be_meant_is_refused_when_the_file_is_read(written, says, tmp_path):
    path = tmp_path / "rollout.yaml"
    path.write_text(f"configs: [{{fn: int8, keep: {written}}}]")

    with pytest.raises(ConfigError, match=says):
        load_config(str(path))


def test_what_quantizes_nothing_has_nothing_to_keep(tmp_path):
    path = tmp_path / "rollout.yaml"
    path.write_text("configs: [{fn: bf16, keep: [lm_head]}]")

    with pytest.raises(ConfigError, match="fn 'bf16' all of them do; leave keep out"):
        load_config(str(path))


def test_a_file_holds_names_words_and_blocks(tmp_path):
    path = tmp_path / "rollout.yaml"
    path.write_text('configs: [{fn: fp8, keep: [lm_head, "*.o_proj", {first: 2}]}]')

    (entry,) = load_config(str(path)).configs

    assert entry.keep == ("lm_head", "*.o_proj", Blocks("first", 2))
