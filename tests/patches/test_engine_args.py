"""What FLASHRL_CONFIG writes into vLLM's engine arguments."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from vllm.engine.arg_utils import EngineArgs

from flashquant.config.checks import Checks
from flashquant.config.schema import FlashConfig, RolloutConfig
from flashquant.config.schemes import W8A8
from flashquant.errors import ConfigError, ProfileError
from flashquant.patches.seams import engine_args
from flashquant.patches.seams.engine_args import configure, rank_of
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
    [("fp8", "fp8_per_tensor"), ("fp8_channel", "fp8_per_channel"), ("bf16", None)],
)
def test_a_scheme_becomes_vllms_own_online_one_where_there_is_one(
    bf16: Path, name: str, quantization: str | None
) -> None:
    args = configured(bf16, RolloutConfig(fn=name))
    theirs = EngineArgs(str(bf16), quantization=quantization)

    assert args.quantization == quantization
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
            "checks": {"ledger": True, "digest": True, "bracket_timeout": 600.0},
        },
    }


def test_an_explicit_executor_beats_the_one_in_the_file(bf16: Path) -> None:
    config = RolloutConfig(fn="bf16", distributed_executor_backend="external_launcher")

    args = configured(bf16, config, distributed_executor_backend="mp")

    assert args.distributed_executor_backend == "mp"
    assert configured(bf16, config).distributed_executor_backend == "external_launcher"


def test_a_contradicting_quantization_is_refused(bf16: Path) -> None:
    with pytest.raises(ConfigError, match="Drop one of the two"):
        configured(bf16, RolloutConfig(fn="fp8_channel"), quantization="fp8_per_block")


def test_ranks_that_would_scale_their_own_shards_are_refused(
    bf16: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """In vLLM before 0.28, a push would not equal a fresh start."""
    configured(bf16, RolloutConfig(fn="fp8_channel"), tensor_parallel_size=2)
    monkeypatch.setattr(engine_args, "vllm_is", lambda versions: versions != ">=0.28")

    with pytest.raises(ConfigError, match=r"2 tensor-parallel ranks needs vLLM 0\.28"):
        configured(bf16, RolloutConfig(fn="fp8_channel"), tensor_parallel_size=2)


@pytest.mark.parametrize("name", ["fp8_tensor"])
def test_a_valid_name_that_is_not_built_says_what_to_use(bf16: Path, name: str) -> None:
    with pytest.raises(ConfigError, match=r"not built yet; (fp8_vllm|int8)"):
        configured(bf16, RolloutConfig(fn=name))


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
