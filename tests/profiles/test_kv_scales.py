"""The scales of an fp8 KV cache: what a model caches, and the file that says so."""

from __future__ import annotations

import json
import math
from pathlib import Path

import pytest
import torch
from torch import nn
from transformers import AutoModelForCausalLM

import flashquant
from flashquant.errors import LocateError, ProfileError
from flashquant.profiles import load_kv_scales, save_kv_scales
from tools.models import tiny_models

PROMPTS = [list(range(3, 40)), list(range(90, 100))]
FIRST = "model.layers.0.self_attn"


@pytest.fixture(params=["llama", "qwen3"])
def model(request: pytest.FixtureRequest, tmp_path: Path) -> nn.Module:
    folder = tiny_models.make(request.param, 0, tmp_path / "model")
    return AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)


def cached(model: nn.Module, block: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Keys and values of every prompt, as transformers' own cache holds them."""
    held = []
    with torch.no_grad():
        for prompt in PROMPTS:
            cache = model.eval()(torch.tensor([prompt]), use_cache=True).past_key_values
            layer = cache.layers[block]
            held.append((layer.keys.flatten(), layer.values.flatten()))
    keys, values = zip(*held, strict=True)
    return torch.cat(keys), torch.cat(values)


def moved(cached: torch.Tensor, scale: float) -> float:
    """By rounding, in squares."""
    rounded = (cached / scale).to(torch.float8_e4m3fn).float() * scale
    return float((rounded - cached).square().sum())


def test_the_largest_key_and_value_fill_between_a_quarter_and_half_of_e4m3(
    model: nn.Module,
) -> None:
    scales = flashquant.kv_scales(model, PROMPTS)

    assert list(scales) == [f"model.layers.{block}.self_attn" for block in range(len(scales))]
    for block, pair in enumerate(scales.values()):
        for scale, side in zip(pair, cached(model, block), strict=True):
            assert 112 <= side.abs().max() / scale <= 224.001
            steps = [scale * 2 ** (step / 8) for step in range(-8, 9)]
            octave = [s for s in steps if 112 < side.abs().max() / s <= 224]
            assert moved(side, scale) <= min(moved(side, s) for s in octave) * 1.001


def test_a_model_in_training_is_left_as_it_was(model: nn.Module) -> None:
    model.train()
    model.get_submodule(FIRST).eval()
    before = {name: module.training for name, module in model.named_modules()}

    assert flashquant.kv_scales(model, PROMPTS) == flashquant.kv_scales(model.eval(), PROMPTS)
    model.train()
    model.get_submodule(FIRST).eval()
    flashquant.kv_scales(model, PROMPTS)

    assert {name: module.training for name, module in model.named_modules()} == before
    assert not any(module._forward_hooks for module in model.modules())


def test_prompts_may_be_tensors_and_wrappers_leave_no_mark(model: nn.Module) -> None:
    wanted = flashquant.kv_scales(model, PROMPTS)

    wrapped = torch.compile(model, backend="eager", disable=True)
    assert flashquant.kv_scales(wrapped, map(torch.tensor, PROMPTS)) == wanted


def spoiled(model: nn.Module, value: float) -> nn.Module:
    weight = model.get_submodule(FIRST).v_proj.weight
    weight.data.fill_(value)
    return model


def test_values_that_are_zero_have_nothing_to_scale(model: nn.Module) -> None:
    assert flashquant.kv_scales(spoiled(model, 0.0), PROMPTS)[FIRST][1] == 1.0


@pytest.mark.parametrize("value", [math.nan, math.inf])
def test_values_that_are_not_finite_are_refused(model: nn.Module, value: float) -> None:
    with pytest.raises(ProfileError, match=rf"the values of {FIRST} reach .*no scale holds them"):
        flashquant.kv_scales(spoiled(model, value), PROMPTS)


@pytest.mark.parametrize(("prompts", "says"), [([], "no prompt"), ([[]], "a prompt is empty")])
def test_nothing_to_run_is_refused(model: nn.Module, prompts: list[list[int]], says: str) -> None:
    with pytest.raises(ProfileError, match=says):
        flashquant.kv_scales(model, prompts)


def test_compressed_attention_is_refused(model: nn.Module) -> None:
    model.config.kv_lora_rank = 8

    with pytest.raises(ProfileError, match="MLA"):
        flashquant.kv_scales(model, PROMPTS)


def test_what_is_saved_is_what_is_read(tmp_path: Path) -> None:
    scales = {FIRST: (0.125, 2.0**-9)}

    save_kv_scales(scales, tmp_path / "kv.json", "a model")

    assert load_kv_scales(tmp_path / "kv.json") == scales
    assert [path.name for path in tmp_path.iterdir()] == ["kv.json"]


@pytest.mark.parametrize(
    "pair", ["[NaN, 1]", "[0, 1]", "[1, -1]", "[1e39, 1]", "[1e-46, 1]", "[1]", '["a", 1]', "1"]
)
def test_scales_that_are_none_are_refused_by_the_name_of_their_layer(
    tmp_path: Path, pair: str
) -> None:
    path = tmp_path / "kv.json"
    save_kv_scales({FIRST: (1.0, 1.0)}, path, "a model")
    good = json.dumps(json.loads(path.read_text())["scales"][FIRST])
    text = json.dumps(json.loads(path.read_text()))
    assert good in text
    path.write_text(text.replace(good, pair))

    with pytest.raises(ProfileError, match=rf"{FIRST}.*two numbers a layer"):
        load_kv_scales(path)


def test_other_files_are_refused(tmp_path: Path) -> None:
    (tmp_path / "kv.json").write_text("{}")
    with pytest.raises(ProfileError, match="profile make --kv"):
        load_kv_scales(tmp_path / "kv.json")
    with pytest.raises(LocateError):
        load_kv_scales(tmp_path / "none.json")
    with pytest.raises(ProfileError, match=r"end its name in \.json"):
        save_kv_scales({FIRST: (1.0, 1.0)}, tmp_path / "kv.safetensors", "a model")
