"""Which modules of a checkpoint an entry has in another scheme."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from flashquant.config.keep import overridden_modules
from flashquant.config.schema import RolloutConfig, load_config
from flashquant.config.schemes import mixed
from flashquant.errors import ConfigError

MODULES = ("self_attn.q_proj", "self_attn.o_proj", "mlp.down_proj")
NAMES = tuple(f"model.layers.{block}.{m}.weight" for block in range(3) for m in MODULES)
DOWN = {f"model.layers.{block}.mlp.down_proj" for block in range(3)}


def chosen(*overrides: tuple[object, str], kept: tuple[str, ...] = ()) -> dict[str, str]:
    written = [{"match": match, "fn": fn} for match, fn in overrides]
    entry = RolloutConfig(fn="int8", overrides=written)
    return overridden_modules([(one.match, one.scheme) for one in entry.overrides], NAMES, kept)


def test_it_matches_what_keep_would():
    assert chosen(("*.down_proj", "fp8_channel")) == dict.fromkeys(DOWN, "fp8_channel")
    blocks = chosen(({"last": 1}, "int4"), ("model.layers.0", "fp8_tensor"))
    assert set(blocks) == {f"model.layers.{block}.{m}" for block in (0, 2) for m in MODULES}
    assert blocks["model.layers.2.mlp.down_proj"] == "int4"


def test_what_is_kept_stays_in_bf16():
    kept = "model.layers.1.mlp.down_proj"
    assert set(chosen(("*.down_proj", "fp8_channel"), kept=(kept,))) == DOWN - {kept}
    with pytest.raises(ConfigError, match=r"all that '\*\.down_proj' matches stays in bf16"):
        chosen(("*.down_proj", "fp8_channel"), kept=tuple(DOWN))


@pytest.mark.parametrize(
    ("overrides", "says"),
    [
        (
            [("*.down_porj", "int4")],
            r"overrides: '\*\.down_porj' matches no.*layers\.\*\.mlp\.down",
        ),
        ([({"first": 9}, "int4")], r"overrides: \{first: 9\} is more than the 3 blocks"),
        (
            [("*.down_proj", "int4"), ("*.layers.2", "fp8_channel")],
            r"'\*\.down_proj' and '\*\.layers\.2' both match model\.layers\.2\.mlp\.down_proj",
        ),
    ],
)
def test_what_matches_nothing_or_twice_is_refused(overrides, says):
    with pytest.raises(ConfigError, match=says):
        chosen(*overrides)


DOWN_IN = {"match": "*.down_proj", "fn": "fp8_channel"}


@pytest.mark.parametrize(
    ("entry", "says"),
    [
        ({"fn": "fp8_vllm", "overrides": [DOWN_IN]}, "'fp8_vllm' cannot stand beside another"),
        (
            {"fn": "int8", "overrides": [{**DOWN_IN, "fn": "mxfp8"}]},
            r"overrides\[0\].fn: 'mxfp8' cannot stand beside another .* may be fp8_channel, fp8_t",
        ),
        ({"fn": "int8", "overrides": [{**DOWN_IN, "fn": "bf16"}]}, "stay in bf16 by `keep`"),
        ({"fn": "int8", "overrides": [{**DOWN_IN, "fn": "fp9"}]}, "'fp9' names no configuration"),
        ({"fn": "int8_fast", "overrides": [{**DOWN_IN, "fn": "int8"}]}, "leave it out"),
        ({"fn": "int8", "overrides": [DOWN_IN], "profile": "p.safetensors"}, "profile scales the"),
        (
            {"fn": "int8", "overrides": [{**DOWN_IN, "layers": 1}]},
            "'layers' is not a key of an override",
        ),
        ({"fn": "int8", "overrides": [{"match": 3, "fn": "int4"}]}, "write a name or a glob"),
    ],
)
def test_what_no_engine_could_serve_is_refused_by_name(tmp_path: Path, entry, says):
    file = tmp_path / "mixed.yaml"
    file.write_text(json.dumps({"configs": [entry]}))
    with pytest.raises(ConfigError, match=says):
        load_config(str(file))


def test_each_scheme_has_a_group_with_its_own_format():
    config = mixed("int8", {"fp8_channel": ["a"], "int4": ["b", "c"]})

    groups = config["config_groups"].values()
    assert [group["targets"] for group in groups] == [["Linear"], ["a"], ["b", "c"]]
    assert [group["format"] for group in groups] == [
        "int-quantized",
        "float-quantized",
        "pack-quantized",
    ]
