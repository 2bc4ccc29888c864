"""`flashquant profile` as a user calls it."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch

from flashquant.cli.main import main
from flashquant.config.schema import load_config
from flashquant.profiles import check_profile_fits, load_kv_scales, load_profile
from flashquant.profiles.making import Checkpoint
from tools.models import flashrl, tiny_models

WORDS = " ".join(f"w{number * 7 % 1000}" for number in range(1200))


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A bf16 model with a tokenizer, and its W8A8 twin."""
    folder = tmp_path_factory.mktemp("models")
    bf16 = tiny_models.add_tokenizer(
        tiny_models.make("llama", 0, folder / "bf16", hidden=128, layers=1)
    )
    flashrl.make_smoothed(bf16, folder / "w8a8")
    (folder / "words.txt").write_text(WORDS)
    return folder


def make(folder: Path, new: Path, *options: str) -> int:
    return main(["profile", "make", str(new), "--model", str(folder / "bf16"), *options])


def test_a_profile_is_calibrated_and_its_checkpoint_written(
    folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    new, w8a8 = tmp_path / "new.safetensors", tmp_path / "w8a8"

    assert make(folder, new, "--text", str(folder / "words.txt"), "--checkpoint", str(w8a8)) == 0

    said = capsys.readouterr().out
    assert "post_attention_layernorm" in said
    assert "gate_proj, up_proj" in said
    profile = load_profile(new)
    assert profile.knows_weight_scales()
    assert profile.base is not None
    assert profile.base.fingerprint
    check_profile_fits(profile, Checkpoint(w8a8).items())
    assert (w8a8 / "profile.safetensors").read_bytes() == new.read_bytes()
    layers = [name for name in Checkpoint(w8a8) if name.endswith("_scale")]
    assert len(layers) == 7


def test_a_profile_is_read_off_a_twin(folder: Path, tmp_path: Path) -> None:
    new = tmp_path / "new.safetensors"

    assert make(folder, new, "--twin", str(folder / "w8a8")) == 0

    profile, wanted = load_profile(new), flashrl.make_profile(folder / "bf16", folder / "w8a8")
    assert profile.entries.keys() == wanted.keys()
    for name, fields in wanted.items():
        columns, ours = fields["input_scale"], profile.entries[name].input_scale
        if isinstance(columns, torch.Tensor):
            assert ours is not None
            torch.testing.assert_close(ours, columns.flatten().float(), rtol=0.01, atol=0)
    check_profile_fits(profile, Checkpoint(folder / "w8a8").items())


def test_jsonl_is_read_by_its_texts(folder: Path, tmp_path: Path) -> None:
    lines = tmp_path / "words.jsonl"
    lines.write_text("\n".join(json.dumps({"text": WORDS[i::2]}) for i in range(2)) + "\n\n")
    half = json.dumps({"text": " ".join(WORDS.split()[:600])})
    lines.write_text(f"{half}\n\n{half}\n")

    assert make(folder, tmp_path / "new.safetensors", "--text", str(lines)) == 0


@pytest.mark.parametrize(
    ("content", "says"),
    [
        ('{"text": "w1"}\n["w2"]\n', "line 2: should be a JSON object with a 'text'"),
        ("not json\n", "line 1: should be a JSON object"),
        ('{"text": "w1 w2"}\n', "shorter than one window of 512 tokens"),
    ],
)
def test_text_that_cannot_be_used_is_refused(
    folder: Path, tmp_path: Path, content: str, says: str, capsys: pytest.CaptureFixture[str]
) -> None:
    lines, new = tmp_path / "words.jsonl", tmp_path / "new.safetensors"
    lines.write_text(content)

    assert make(folder, new, "--text", str(lines)) == 1

    assert says in capsys.readouterr().err
    assert not new.exists()


def test_a_model_that_wants_to_run_its_own_code_is_not_loaded(
    folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    evil, mark = tmp_path / "bf16", tmp_path / "was run"
    tiny_models.make("llama", 0, evil, hidden=128, layers=1)
    config = json.loads((evil / "config.json").read_text())
    config |= {"model_type": "evil", "auto_map": {"AutoModelForCausalLM": "evil.Evil"}}
    (evil / "config.json").write_text(json.dumps(config))
    (evil / "evil.py").write_text(f"open({str(mark)!r}, 'w')")

    new, text = tmp_path / "new.safetensors", str(folder / "words.txt")
    assert main(["profile", "make", str(new), "--model", str(evil), "--text", text]) == 1

    assert "transformers does not load" in capsys.readouterr().err
    assert not mark.exists()


def test_profiles_are_compared(
    folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    one, other = tmp_path / "one.safetensors", tmp_path / "other.safetensors"
    make(folder, one, "--twin", str(folder / "w8a8"))
    make(folder, other, "--text", str(folder / "words.txt"))
    capsys.readouterr()

    assert main(["profile", "compare", str(one), str(one)]) == 0
    same = capsys.readouterr().out
    assert main(["profile", "compare", str(one), str(other)]) == 0
    different = capsys.readouterr().out

    assert "9 of 9 weights are scaled alike" in same
    assert "down_proj" in different
    assert "0 of 9 weights" in different


def test_a_profile_is_drawn(folder: Path, tmp_path: Path) -> None:
    pytest.importorskip("matplotlib")
    new, png = tmp_path / "new.safetensors", tmp_path / "new.png"
    make(folder, new, "--twin", str(folder / "w8a8"))

    assert main(["profile", "inspect", str(new), "--plot", str(png)]) == 0

    assert png.read_bytes().startswith(b"\x89PNG")
    assert png.stat().st_size > 10_000


def test_the_scales_of_a_kv_cache_are_made(
    folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    new, text = tmp_path / "kv.json", str(folder / "words.txt")

    assert make(folder, new, "--text", text, "--kv") == 0

    scales = load_kv_scales(new)
    assert list(scales) == ["model.layers.0.self_attn"]
    assert "model.layers.0.self_attn" in capsys.readouterr().out
    assert make(folder, new, "--twin", str(folder / "w8a8"), "--kv") == 1
    assert "give --text" in capsys.readouterr().err


def test_a_profile_for_int4_is_made(
    folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    new, text = tmp_path / "new.safetensors", str(folder / "words.txt")

    assert make(folder, new, "--text", text, "--scheme", "int4_g32") == 0

    profile = load_profile(new)
    assert profile.scheme == "int4_g32"
    held = {name: entry.held for name, entry in profile.entries.items() if entry.held is not None}
    assert len(held) == 7
    assert "o_proj" in capsys.readouterr().out
    assert make(folder, new, "--twin", str(folder / "w8a8"), "--scheme", "int4") == 1
    assert "W8A8 checkpoints" in capsys.readouterr().err
    assert main(["profile", "inspect", str(new)]) == 0


def test_what_layers_cost_becomes_an_entry_that_keeps_some(
    folder: Path,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """The file is one that FLASHRL_CONFIG may name, wherever it lies."""
    entry, png = tmp_path / "kept.yaml", tmp_path / "costs.png"
    monkeypatch.chdir(folder)
    asked = ["profile", "sensitivity", "--model", "bf16", "--scheme", "fp8_channel"]
    text = ["--text", str(folder / "words.txt"), "--tokens", "512"]

    assert main([*asked, *text, "--budget", "1e-9", "--write", str(entry), "--png", str(png)]) == 0

    assert "7 of 7 layers kept (100.0% of their weights): 0.0000" in capsys.readouterr().out
    assert png.stat().st_size > 10_000
    monkeypatch.chdir(tmp_path)
    (read,) = load_config(str(entry)).configs
    assert read.fn == "fp8_channel"
    assert read.model == str(folder / "bf16")
    assert len(read.keep) == 7


def test_an_entry_is_never_written_over(folder: Path, tmp_path: Path) -> None:
    (tmp_path / "mine.yaml").write_text("configs: []")
    asked = ["profile", "sensitivity", "--model", str(folder / "bf16")]
    text = ["--text", str(folder / "words.txt"), "--tokens", "512"]

    assert main([*asked, *text, "--write", str(tmp_path / "mine.yaml")]) == 1

    assert (tmp_path / "mine.yaml").read_text() == "configs: []"
