"""What FLASHRL_CONFIG writes into vLLM's engine arguments."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import pytest
import torch
from vllm.engine.arg_utils import EngineArgs

from flashquant.config.checks import Checks
from flashquant.config.schema import FlashConfig, RolloutConfig
from flashquant.config.schemes import COMPRESSED, W8A8
from flashquant.errors import ConfigError, ProfileError
from flashquant.patches.decided import ADDITIONAL_CONFIG_KEY, KEPT_KEY, PROFILE_KEY
from flashquant.patches.seams import engine_args
from flashquant.patches.seams import kept as kept_seam
from flashquant.patches.seams.engine_args import configure, rank_of
from flashquant.profiles import Entry, Profile, save_kv_scales, save_profile
from tools.models import flashrl, tiny_models


@pytest.fixture(scope="module")
def bf16(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny_models.make("llama", 0, tmp_path_factory.mktemp("checkpoints") / "bf16")


def configured(model: Path, config: RolloutConfig, **explicit: Any) -> EngineArgs:
    args = EngineArgs(str(model), **explicit)
    configure(args, config, Checks())
    return args


@pytest.mark.parametrize(
    ("name", "quantization"),
    [
        ("fp8", "fp8_per_tensor"),
        ("fp8_channel", "fp8_per_channel"),
        ("bf16", None),
    ],
)
def test_a_scheme_becomes_vllms_own_online_one_where_there_is_one(
    bf16: Path, name: str, quantization: str | None
) -> None:
    args = configured(bf16, RolloutConfig(fn=name))
    theirs = EngineArgs(str(bf16), quantization=quantization)

    assert args.quantization == quantization
    assert args.quantization_config == theirs.quantization_config


def test_a_name_that_vllm_leaves_for_later_is_settled_at_once(bf16: Path) -> None:
    """It has checkpoints of that name, too."""
    args = configured(bf16, RolloutConfig(fn="mxfp8"))
    theirs = EngineArgs(str(bf16), quantization="mxfp8", quantization_config={"ignore": []})

    assert args.quantization == "mxfp8"
    assert args.quantization_config == theirs.quantization_config


def test_what_else_is_said_of_a_quantization_stays(bf16: Path) -> None:
    args = configured(
        bf16, RolloutConfig(fn="fp8_channel"), quantization_config={"ignore": ["lm_head"]}
    )

    assert args.quantization_config.ignore == ["lm_head"]
    assert args.quantization_config.linear is not None


def test_int8_serves_a_bf16_checkpoint_as_w8a8(bf16: Path) -> None:
    args = configured(bf16, RolloutConfig(fn="int8"), hf_overrides={"rope_theta": 1e6})

    assert args.quantization == "compressed-tensors"
    assert args.hf_overrides == {"rope_theta": 1e6, "quantization_config": W8A8}


def test_int8_leaves_a_w8a8_checkpoint_alone(bf16: Path, tmp_path: Path) -> None:
    args = configured(tiny_models.make_quantized(bf16, tmp_path / "w8a8"), RolloutConfig(fn="int8"))

    assert not args.hf_overrides


def test_towers_are_quantized_by_request_and_of_bf16_checkpoints_only(
    bf16: Path, tmp_path: Path
) -> None:
    asked = RolloutConfig(fn="int8", quantize_towers=True)

    assert configured(bf16, asked).additional_config["flashquant"]["quantize_towers"]
    with pytest.raises(ConfigError, match="quantized already: it says itself which layers"):
        configured(tiny_models.make_quantized(bf16, tmp_path / "w8a8"), asked)


@pytest.mark.parametrize("name", ["bf16", "fp8", "fp8_channel"])
def test_a_checkpoint_quantized_otherwise_is_refused(bf16: Path, tmp_path: Path, name: str) -> None:
    w8a8 = tiny_models.make_quantized(bf16, tmp_path / "w8a8")

    with pytest.raises(ConfigError, match=r"quantized already .* int8 for W8A8"):
        configured(w8a8, RolloutConfig(fn=name))


def test_the_scheme_travels_with_vllms_config(bf16: Path) -> None:
    args = configured(bf16, RolloutConfig(fn="int8_fast"), additional_config={"theirs": 1})

    assert args.additional_config == {
        "theirs": 1,
        "flashquant": {
            "scheme": "int8",
            "starts_on_floats": True,
            "checks": {"ledger": True, "digest": True, "undo": "auto", "bracket_timeout": 600.0},
        },
    }


def test_an_explicit_executor_beats_the_one_in_the_file(bf16: Path) -> None:
    config = RolloutConfig(fn="bf16", distributed_executor_backend="external_launcher")

    args = configured(bf16, config, distributed_executor_backend="mp")

    assert args.distributed_executor_backend == "mp"
    assert configured(bf16, config).distributed_executor_backend == "external_launcher"


CONTRADICTIONS: dict[str, tuple[str, dict[str, Any], str]] = {
    "another scheme of vLLM's": (
        "fp8_channel",
        {"quantization": "fp8_per_block"},
        "Drop one of the two",
    ),
    "a scheme, where there is to be none": ("bf16", {"quantization": "fp8"}, "Drop one of the two"),
    "other codes of linear layers": (
        "fp8_vllm",
        {"quantization_config": {"linear": "fp8_per_block"}},
        "asks for fp8_vllm, .* whose linear ask for something else",
    ),
    "other codes of experts": (
        "fp8_channel",
        {"quantization_config": {"moe": "mxfp8"}},
        "whose moe ask for something else",
    ),
    "codes that the checkpoint does not hold": (
        "bf16",
        {"hf_overrides": {"quantization_config": W8A8}},
        "hf_overrides says that it is quantized already",
    ),
}


@pytest.mark.parametrize(("name", "explicit", "says"), CONTRADICTIONS.values(), ids=CONTRADICTIONS)
def test_a_contradicting_argument_is_refused(
    bf16: Path, name: str, explicit: dict[str, Any], says: str
) -> None:
    with pytest.raises(ConfigError, match=says):
        configured(bf16, RolloutConfig(fn=name), **explicit)


def test_what_agrees_with_the_scheme_is_no_contradiction(bf16: Path) -> None:
    same = {"linear": "fp8_per_tensor", "ignore": ["lm_head"]}

    args = configured(bf16, RolloutConfig(fn="fp8_vllm"), quantization_config=same)

    assert args.quantization_config.ignore == ["lm_head"]


DOWN = "re:.*down_proj.*"
ANEW = {
    "by vLLM's own argument": {"quantization_config": {"ignore": [DOWN]}},
    "by hf_overrides": {"hf_overrides": {"quantization_config": {**W8A8, "ignore": [DOWN]}}},
}


@pytest.mark.parametrize("explicit", ANEW.values(), ids=ANEW)
def test_what_a_quantized_checkpoint_leaves_in_bf16_cannot_be_said_anew(
    w8a8: Path, explicit: dict[str, Any]
) -> None:
    """Its codes have no bf16; vLLM says so in words of its own, or looks for scales in vain."""
    with pytest.raises(ConfigError, match=r"is quantized already, and says itself.*lm_head.*bf16"):
        configured(w8a8, RolloutConfig(fn="int8"), **explicit)


def test_the_ignore_of_a_quantized_checkpoint_may_be_repeated(w8a8: Path) -> None:
    own = json.loads((w8a8 / "config.json").read_text())["quantization_config"]

    configured(w8a8, RolloutConfig(fn="int8"), hf_overrides={"quantization_config": own})


def test_ranks_that_would_scale_their_own_shards_are_refused(
    bf16: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """In vLLM before 0.28, a push would not equal a fresh start."""
    configured(bf16, RolloutConfig(fn="fp8_channel"), tensor_parallel_size=2)
    monkeypatch.setattr(engine_args, "vllm_is", lambda versions: versions != ">=0.28")

    with pytest.raises(ConfigError, match=r"2 tensor-parallel ranks needs vLLM 0\.28"):
        configured(bf16, RolloutConfig(fn="fp8_channel"), tensor_parallel_size=2)


def test_a_valid_name_that_a_version_does_not_serve_says_what_to_use(
    bf16: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(engine_args, "vllm_is", lambda versions: False)

    with pytest.raises(ConfigError, match=r"fp8_tensor is a valid name, .* fp8_vllm stores one"):
        configured(bf16, RolloutConfig(fn="fp8_tensor"))


FLASHRLS = (
    *("bf16", "fp8", "fp8_fast", "fp8_vllm", "fp8_vllm_fast", "fp8_channel", "fp8_tensor"),
    *("int8", "int8_fast", "int8_wo_prune", "int8_prune"),
)


@pytest.mark.parametrize("name", FLASHRLS)
def test_every_name_of_flashrl_is_served(bf16: Path, w8a8: Path, name: str) -> None:
    """Those that `flashrl setup --fn` takes in 1.0.3; with a model where it wants one."""
    model = str(w8a8) if name == "int8_prune" else None

    args = configured(bf16, RolloutConfig(fn=name, model=model))

    assert args.additional_config["flashquant"]["scheme"] == RolloutConfig(fn=name).scheme.replace(
        "_prune", ""
    )


def test_fp8_by_tensor_serves_a_bf16_checkpoint_as_one_with_a_scale_a_channel(bf16: Path) -> None:
    args = configured(bf16, RolloutConfig(fn="fp8_tensor"))

    assert args.quantization == "compressed-tensors"
    assert args.hf_overrides == {"quantization_config": COMPRESSED["fp8_tensor"]}


LISTED = [f"model.layers.{i}.mlp.{n}_proj.weight" for i in (0, 1) for n in ("gate", "up", "down")]


@pytest.mark.parametrize("name", ["fp8_tensor", "fp8_channel"])
def test_a_list_of_flashrl_says_what_is_quantized(bf16: Path, tmp_path: Path, name: str) -> None:
    torch.save(LISTED, tmp_path / "profile.pt")

    args = configured(bf16, RolloutConfig(fn=name, profile=str(tmp_path / "profile.pt")))

    kept = args.additional_config["flashquant"]["kept"]
    assert "model.layers.0.self_attn.q_proj" in kept
    assert not any(".mlp." in module for module in kept)
    own = args.hf_overrides["quantization_config"] if name == "fp8_tensor" else None
    assert "model.layers.1.self_attn.o_proj" in (
        own["ignore"] if own else args.quantization_config.ignore
    )


@pytest.mark.parametrize(
    ("held", "says", "error"),
    [
        (["model.layers.0.mlp.downproj.weight"], r"lists .*downproj.*mlp\.down_proj", ConfigError),
        ({"a": 1}, "holds a dict, but the profile of an fp8 scheme is a list", ProfileError),
        ([], "lists no weight", ProfileError),
    ],
    ids=["another model's", "for int8", "empty"],
)
def test_a_list_that_cannot_be_meant_is_refused(
    bf16: Path, tmp_path: Path, held: object, says: str, error: type[Exception]
) -> None:
    torch.save(held, tmp_path / "profile.pt")

    with pytest.raises(error, match=says):
        configured(bf16, RolloutConfig(fn="fp8_tensor", profile=str(tmp_path / "profile.pt")))


@pytest.fixture(scope="module")
def w8a8(bf16: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A smoothed checkpoint that brings its profile, where FlashRL looks for it."""
    path = flashrl.make_smoothed(bf16, tmp_path_factory.mktemp("checkpoints") / "w8a8")
    torch.save(flashrl.make_profile(bf16, path), path / "profile.pt")
    return path


@pytest.mark.parametrize("named", [True, False], ids=["named", "in the model"])
def test_a_profile_travels_with_vllms_config(bf16: Path, w8a8: Path, named: bool) -> None:
    reference = str(w8a8 / "profile.pt")

    args = configured(
        bf16,
        RolloutConfig(fn="int8", model=str(w8a8), profile=reference if named else None),
    )

    assert args.model == str(w8a8)
    assert args.additional_config["flashquant"]["profile"] == {
        "reference": reference,
        "scales": "refreshed",
        "starts_on_floats": False,
        "warn_above": 0.001,
        "prunes": False,
    }


def test_int8_prune_is_int8_with_a_profile(bf16: Path, w8a8: Path) -> None:
    decided = configured(bf16, RolloutConfig(fn="int8_prune", model=str(w8a8))).additional_config

    assert decided["flashquant"]["scheme"] == "int8"
    assert decided["flashquant"]["profile"]["prunes"]


def test_int8_prune_without_a_profile_says_what_is_missing(bf16: Path) -> None:
    with pytest.raises(ConfigError, match="Name it under `profile`, or use int8"):
        configured(bf16, RolloutConfig(fn="int8_prune"))


def test_a_w8a8_checkpoint_without_a_profile_is_served_without(bf16: Path, tmp_path: Path) -> None:
    w8a8 = tiny_models.make_quantized(bf16, tmp_path / "w8a8")

    args = configured(bf16, RolloutConfig(fn="int8", model=str(w8a8)))

    assert "profile" not in args.additional_config["flashquant"]


def test_a_profile_on_a_bf16_checkpoint_is_told_what_it_belongs_to(bf16: Path, w8a8: Path) -> None:
    with pytest.raises(ConfigError, match="Name that checkpoint under `model`"):
        configured(bf16, RolloutConfig(fn="int8", profile=str(w8a8 / "profile.pt")))


def test_a_profile_that_cannot_be_read_is_an_error_before_any_engine(
    w8a8: Path, tmp_path: Path
) -> None:
    (tmp_path / "profile.pt").write_bytes(b"nothing")

    with pytest.raises(ProfileError, match=r"no file that torch\.save wrote"):
        configured(w8a8, RolloutConfig(fn="int8", profile=str(tmp_path / "profile.pt")))


def test_a_profile_is_not_read_where_nothing_needs_one(
    bf16: Path, caplog: pytest.LogCaptureFixture
) -> None:
    """FlashRL's files may name one all the same."""
    args = configured(bf16, RolloutConfig(fn="fp8", profile="no/such/profile.pt"))

    assert "profile" not in args.additional_config["flashquant"]
    assert "fp8 needs no profile" in caplog.text


def test_a_model_may_be_named_at_a_revision(bf16: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[tuple[str, str | None]] = []

    def config_of(model: str, revision: str | None) -> tuple[dict[str, Any], None]:
        asked.append((model, revision))
        return {}, None

    monkeypatch.setattr(engine_args.PretrainedConfig, "get_config_dict", config_of)

    args = configured(bf16, RolloutConfig(fn="bf16", model="owner/repo@v1"))

    assert asked == [("owner/repo", "v1")]
    assert (args.model, args.revision) == ("owner/repo", "v1")


def test_int8_with_a_function_as_hf_overrides_is_refused(bf16: Path) -> None:
    with pytest.raises(ConfigError, match="as a dict"):
        configured(bf16, RolloutConfig(fn="int8"), hf_overrides=lambda config: config)


TWO = FlashConfig(configs=(RolloutConfig(fn="int8"), RolloutConfig(fn="bf16")), source="two.yaml")


@pytest.mark.parametrize(
    ("explicit", "environ", "rank"),
    [
        ({}, {}, 0),
        ({"data_parallel_rank": 3}, {"RANK": "1"}, 3),
        ({"distributed_executor_backend": "external_launcher"}, {"RANK": "5"}, 5),
        (
            {"distributed_executor_backend": "external_launcher", "tensor_parallel_size": 2},
            {"RANK": "5"},
            2,
        ),
        ({"distributed_executor_backend": "mp"}, {"RANK": "5"}, 0),
        ({}, {"VLLM_DP_RANK": "1"}, 1),
    ],
)
def test_an_engine_of_its_own_asks_its_data_parallel_rank(
    explicit: dict[str, Any], environ: dict[str, str], rank: int, tmp_path: Path
) -> None:
    """By argument, by torchrun, or by the environment, as vLLM takes it."""
    assert rank_of(EngineArgs(str(tmp_path), **explicit), TWO, environ) == rank


def test_torchruns_rank_counts_where_the_file_asks_for_external_launcher(tmp_path: Path) -> None:
    """FlashRL's files do."""
    entry = RolloutConfig(fn="bf16", distributed_executor_backend="external_launcher")
    flash = FlashConfig(configs=(entry, entry), source="flashrl.yaml")

    assert rank_of(EngineArgs(str(tmp_path)), flash, {"RANK": "1"}) == 1


KEEP_DOWN = ("*.down_proj",)


@pytest.mark.parametrize("name", ["int8", "fp8", "fp8_channel", "fp8_block", "mxfp8"])
def test_what_is_kept_becomes_vllms_own_argument(bf16: Path, name: str) -> None:
    args = configured(bf16, RolloutConfig(fn=name, keep=KEEP_DOWN))

    own = args.hf_overrides["quantization_config"] if name == "int8" else None
    ignored = own["ignore"] if own else args.quantization_config.ignore
    assert {f"model.layers.{i}.mlp.down_proj" for i in (0, 1)} <= set(ignored)
    assert args.additional_config["flashquant"]["kept"] == (
        "model.layers.0.mlp.down_proj",
        "model.layers.1.mlp.down_proj",
    )


def test_what_is_kept_adds_to_what_the_engine_was_given(bf16: Path) -> None:
    theirs = {"ignore": ["lm_head"]}
    args = configured(
        bf16, RolloutConfig(fn="fp8_channel", keep=KEEP_DOWN), quantization_config=theirs
    )

    assert args.quantization_config.ignore[0] == "lm_head"
    assert "model.layers.1.mlp.down_proj" in args.quantization_config.ignore
    assert theirs == {"ignore": ["lm_head"]}


def test_vllms_shorthand_is_not_changed_for_everybody(bf16: Path) -> None:
    """It is one object for all engines of a process."""
    configured(
        bf16, RolloutConfig(fn="fp8_channel", keep=KEEP_DOWN), quantization="fp8_per_channel"
    )

    assert EngineArgs(str(bf16), quantization="fp8_per_channel").quantization_config.ignore == []


@pytest.mark.parametrize("name", ["int8", "fp8_channel"])
def test_a_word_that_matches_nothing_is_refused_before_anything_is_written(
    bf16: Path, name: str
) -> None:
    args = EngineArgs(str(bf16))

    with pytest.raises(ConfigError, match=r"'\*\.qkv_proj' matches no module .*self_attn\."):
        configure(args, RolloutConfig(fn=name, keep=("*.qkv_proj",)), Checks())

    assert args.additional_config == EngineArgs(str(bf16)).additional_config
    assert args.quantization is None
    assert args.quantization_config is None


def test_a_kv_scale_that_is_no_number_is_refused_before_anything_is_written(
    bf16: Path, tmp_path: Path
) -> None:
    file, args = tmp_path / "kv.json", EngineArgs(str(bf16))
    save_kv_scales({"model.layers.0.self_attn": (0.5, 1.0)}, file, "a model")
    file.write_text(file.read_text().replace("0.5", "NaN"))

    with pytest.raises(ProfileError, match=r"layers\.0\.self_attn.*two numbers a layer"):
        configure(args, RolloutConfig(fn="int8", kv_cache="fp8", kv_scales=str(file)), Checks())

    untouched = EngineArgs(str(bf16))
    for name in ("additional_config", "quantization", "hf_overrides"):
        assert getattr(args, name) == getattr(untouched, name)


def test_what_a_checkpoint_holds_as_codes_cannot_be_kept(bf16: Path, tmp_path: Path) -> None:
    stored = tiny_models.make_quantized(bf16, tmp_path / "w8a8")

    with pytest.raises(ConfigError, match=r"layers\.0\.mlp\.down_proj is quantized already in"):
        configured(stored, RolloutConfig(fn="int8", keep=KEEP_DOWN))
    configured(stored, RolloutConfig(fn="int8", keep=("lm_head",)))


def test_what_a_profile_scales_is_kept_beside_it(bf16: Path, tmp_path: Path) -> None:
    """Its bf16 weights are scaled, too: `profiles.Calibration`."""
    one = torch.ones(1)
    entries = {"model.layers.0.mlp.down_proj.weight": Entry(torch.int8, one, one, one)}
    save_profile(Profile(entries, "made"), tmp_path / "profile.safetensors")
    entry = RolloutConfig(fn="int8", keep=KEEP_DOWN, profile=str(tmp_path / "profile.safetensors"))

    decided = configured(bf16, entry).additional_config[ADDITIONAL_CONFIG_KEY]

    assert "model.layers.0.mlp.down_proj" in decided[KEPT_KEY]
    assert decided[PROFILE_KEY]["starts_on_floats"]


def test_without_safetensors_nothing_can_be_kept(bf16: Path, tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text((bf16 / "config.json").read_text())

    with pytest.raises(ConfigError, match=r"keep names modules of the checkpoint, and .*folder"):
        configured(tmp_path, RolloutConfig(fn="int8", keep=KEEP_DOWN))


def test_a_tower_and_a_prefix_of_vllms_own_are_no_obstacle() -> None:
    """What is kept whole is asked for by one expression, below any prefix; parts by their names."""
    modules = ("layers.0.a.q", "layers.0.a.k", "layers.1.a.q", "layers.1.a.k", "layers.10.a.q")

    names = kept_seam.patterns(frozenset({"layers.1.a.q", "layers.1.a.k"}), modules)

    (expression,) = (name.removeprefix("re:") for name in names if name.startswith("re:"))
    assert re.match(expression, "model.layers.1.a.qk")
    assert re.match(expression, "layers.1")
    assert not re.match(expression, "model.layers.10.a.q")
    assert not re.match(expression, "model.layers.0.a.q")
