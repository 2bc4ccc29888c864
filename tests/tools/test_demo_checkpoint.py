"""The demo's model is what its GGUF says, and half a checkpoint is never taken for one."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

from examples.demo import smollm2


@pytest.fixture
def checkpoint(tmp_path: Path) -> Path:
    """A complete checkpoint directory, small."""
    directory = tmp_path / smollm2.NAME
    directory.mkdir()
    for name in smollm2.FILES:
        (directory / name).write_text("{}")
    save_file({"weight": torch.arange(100.0)}, directory / "model.safetensors")
    return directory


@pytest.fixture
def conversions(monkeypatch: pytest.MonkeyPatch) -> list[Path]:
    """Where `convert` was asked to write; it writes a complete, empty checkpoint."""
    asked: list[Path] = []

    def convert(gguf_file: Path, directory: Path) -> None:
        asked.append(directory)
        for name in smollm2.FILES:
            (directory / name).write_text("{}")
        save_file({}, directory / "model.safetensors")

    monkeypatch.setattr(smollm2, "convert", convert)
    monkeypatch.setattr(smollm2, "find_gguf", lambda: Path("model.gguf"))
    return asked


def llama_cpp_permutation(weight: torch.Tensor, heads: int) -> torch.Tensor:
    """`LlamaModel.permute` of llama.cpp's converter, as it stands there."""
    halves = weight.reshape(heads, 2, weight.shape[0] // heads // 2, *weight.shape[1:])
    return halves.swapaxes(1, 2).reshape(weight.shape)


@pytest.mark.parametrize(("heads", "rows"), [(1, 8), (3, 24), (9, 576)])
def test_the_rope_permutation_is_undone(heads: int, rows: int):
    weight = torch.arange(rows * 5.0).reshape(rows, 5)

    permuted = llama_cpp_permutation(weight, heads)

    assert torch.equal(smollm2.undo_rope_permutation(permuted, heads), weight)


def test_a_heads_interleaved_rows_become_its_two_halves():
    interleaved = torch.tensor([[0], [4], [1], [5], [2], [6], [3], [7]])

    restored = smollm2.undo_rope_permutation(interleaved, heads=1)

    assert restored.flatten().tolist() == [0, 1, 2, 3, 4, 5, 6, 7]


@pytest.mark.parametrize(
    ("stored", "expected"),
    [
        ("token_embd.weight", "model.embed_tokens.weight"),
        ("output_norm.weight", "model.norm.weight"),
        ("blk.0.attn_q.weight", "model.layers.0.self_attn.q_proj.weight"),
        ("blk.29.ffn_norm.weight", "model.layers.29.post_attention_layernorm.weight"),
    ],
)
def test_names_are_those_of_hugging_face(stored: str, expected: str):
    assert smollm2.hugging_face_name(stored) == expected


def test_an_unknown_tensor_is_not_passed_over():
    with pytest.raises(KeyError):
        smollm2.hugging_face_name("blk.0.attn_q_norm.weight")


def test_a_whole_checkpoint_is_complete(checkpoint: Path):
    assert smollm2.is_complete(checkpoint)


@pytest.mark.parametrize("name", smollm2.FILES)
def test_a_missing_file_makes_it_incomplete(checkpoint: Path, name: str):
    (checkpoint / name).unlink()

    assert not smollm2.is_complete(checkpoint)


@pytest.mark.parametrize("kept", [0, 4, 20, -1])
def test_cut_off_weights_make_it_incomplete(checkpoint: Path, kept: int):
    weights = checkpoint / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:kept])

    assert not smollm2.is_complete(checkpoint)


def test_a_complete_checkpoint_is_reused(checkpoint: Path, conversions: list[Path]):
    assert smollm2.checkpoint(checkpoint.parent) == checkpoint

    assert conversions == []


def test_an_incomplete_checkpoint_is_made_again(checkpoint: Path, conversions: list[Path]):
    (checkpoint / "model.safetensors").write_bytes(b"")

    found = smollm2.checkpoint(checkpoint.parent)

    assert found == checkpoint
    assert smollm2.is_complete(found)
    assert len(conversions) == 1


def test_a_failed_conversion_leaves_nothing_behind(
    tmp_path: Path, conversions: list[Path], monkeypatch: pytest.MonkeyPatch
):
    def run_out_of_disk(gguf_file: Path, directory: Path) -> None:
        (directory / "config.json").write_text("{}")
        raise OSError("no space left on device")

    monkeypatch.setattr(smollm2, "convert", run_out_of_disk)

    with pytest.raises(OSError, match="no space"):
        smollm2.checkpoint(tmp_path)

    assert [path.name for path in tmp_path.iterdir()] == [".gitignore"]
