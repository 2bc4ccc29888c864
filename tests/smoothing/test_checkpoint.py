"""The W8A8 checkpoint of a profile: what an engine would hold, on disk."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

from flashquant.errors import ProfileError
from flashquant.profiles import Calibration, Entry, Profile, check_profile_fits
from flashquant.profiles.making import Checkpoint, Factors, Producer, Site, profile_of, write_w8a8
from tools.models import tiny_models

LAYER = "model.layers.0"


@pytest.fixture(scope="module")
def source(tmp_path_factory: pytest.TempPathFactory) -> Checkpoint:
    """In two files, as large checkpoints are, with what lies beside them."""
    folder = tmp_path_factory.mktemp("model") / "bf16"
    weights = tiny_models.tensors(tiny_models.make("llama", 0, folder, hidden=128, layers=1))
    (folder / "model.safetensors").unlink()
    for number, part in enumerate((sorted(weights)[:5], sorted(weights)[5:])):
        file = folder / f"model-{number}.safetensors"
        save_file({name: weights[name] for name in part}, file)
    (folder / "tokenizer.json").write_text("{}")
    (folder / "modeling_evil.py").write_text("raise SystemExit")
    return Checkpoint(folder)


@pytest.fixture
def profile(source: Checkpoint) -> Profile:
    norm = f"{LAYER}.input_layernorm.weight"
    readers = tuple(f"{LAYER}.self_attn.{x}_proj.weight" for x in "qkv")
    factors = Factors()
    by = 2.0 ** torch.randint(-2, 3, (128,), generator=torch.Generator().manual_seed(0))
    factors.smooth(Site((Producer(norm, 0, 128),), readers), by, {norm: 128})
    layers = [name for name in source if name.endswith("_proj.weight")]
    return profile_of(factors, source.items(), dict.fromkeys(layers), "p")


def test_it_holds_what_a_push_would_leave(source: Checkpoint, profile: Profile, tmp_path: Path):
    written = Checkpoint(write_w8a8(source, profile, tmp_path / "w8a8"))

    calibration = Calibration(
        profile, scales="frozen", device=torch.device("cpu"), starts_on_floats=True
    )
    for name, weight in source.items():
        if name not in profile.entries:
            assert torch.equal(written[name], weight)
            continue
        for stored, values in calibration.stored(name, weight):
            assert torch.equal(written[stored], values)
    check_profile_fits(profile, written.items())


def test_codes_times_scales_are_the_smoothed_weights(
    source: Checkpoint, profile: Profile, tmp_path: Path
):
    written = Checkpoint(write_w8a8(source, profile, tmp_path / "w8a8"))
    name, norm = f"{LAYER}.self_attn.q_proj.weight", f"{LAYER}.input_layernorm.weight"

    by = source[norm].float() / written[norm].float()
    served = written[name].float() * written[f"{name}_scale"]

    wanted = source[name].float() * by
    half_a_code = written[f"{name}_scale"] / 2 * 1.0001
    assert ((served - wanted).abs() <= half_a_code).all()
    assert served.abs().amax(1).allclose(wanted.abs().amax(1))
    assert not torch.equal(by, torch.ones(128))


def test_it_is_a_whole_model_and_nothing_that_runs(
    source: Checkpoint, profile: Profile, tmp_path: Path
):
    folder = write_w8a8(source, profile, tmp_path / "w8a8")

    config = json.loads((folder / "config.json").read_text())
    index = json.loads((folder / "model.safetensors.index.json").read_text())["weight_map"]
    assert config["quantization_config"]["quant_method"] == "compressed-tensors"
    assert index.keys() == Checkpoint(folder).keys()
    assert (folder / "tokenizer.json").exists()
    assert not (folder / "modeling_evil.py").exists()


def test_a_folder_that_is_there_is_not_written_into(
    source: Checkpoint, profile: Profile, tmp_path: Path
):
    with pytest.raises(ProfileError, match="is there already"):
        write_w8a8(source, profile, tmp_path)


def test_flashrls_profiles_know_no_scales(source: Checkpoint, tmp_path: Path):
    entry = Entry(torch.int8, None, torch.ones(128))

    with pytest.raises(ProfileError, match="knows no weight scales"):
        write_w8a8(source, Profile({"q.weight": entry}, "p.pt"), tmp_path / "new")

    assert not (tmp_path / "new").exists()


def test_a_folder_without_a_model_is_refused(tmp_path: Path):
    with pytest.raises(ProfileError, match=r"no folder of a model.*hf download"):
        Checkpoint(tmp_path)


def test_a_broken_file_is_named(source: Checkpoint, tmp_path: Path):
    (tmp_path / "a.safetensors").write_bytes(b"\xff" * 64)

    with pytest.raises(ProfileError, match=r"a\.safetensors is no safetensors file"):
        Checkpoint(tmp_path)


def test_a_layer_that_is_missing_is_named(source: Checkpoint):
    with pytest.raises(ProfileError, match=r"has no other.weight \(1 such layers\)"):
        profile_of(Factors(), source.items(), {"other.weight": None}, "p")
