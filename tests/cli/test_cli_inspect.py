"""`flashquant inspect`: a plan as a table, as JSON and as a picture."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from rich.console import Console

from flashquant.cli.main import main
from flashquant.patches import diagnostics
from flashquant.patches.diagnostics import (
    Destination,
    Form,
    InspectedLayer,
    InspectedTensor,
    Inspection,
    lines_of,
)

ROWS, COLUMNS = 4, 8


def copied(target: str, first: int) -> tuple[Destination, ...]:
    return (Destination(target, (ROWS, COLUMNS), (COLUMNS, 1), first * COLUMNS, "copy"),)


def shard(block: int, name: str, first: int) -> InspectedTensor:
    target = f"model.layers.{block}.qkv_proj.weight"
    form = Form("bfloat16", (ROWS, COLUMNS))
    return InspectedTensor(f"model.layers.{block}.{name}.weight", form, copied(target, first))


def fused(block: int) -> InspectedLayer:
    return InspectedLayer(
        name=f"model.layers.{block}.qkv_proj",
        module="QKVParallelLinear",
        processed_by=("SomeMethod", "SomeKernel"),
        how="in place",
        quantized=True,
        parameters={f"model.layers.{block}.qkv_proj.weight": Form("bfloat16", (8, COLUMNS))},
        reads={
            "weight": Form("float8_e4m3fn", (COLUMNS, 8)),
            "weight_scale": Form("float32", (8, 1)),
        },
    )


@pytest.fixture
def inspection(monkeypatch: pytest.MonkeyPatch) -> Inspection:
    """Two blocks of two shards, a head that is dropped and a tensor that is refused."""
    form = Form("bfloat16", (ROWS,))
    made = Inspection(
        model="/models/tiny",
        architecture="TinyForCausalLM",
        scheme="fp8_channel",
        device="cpu",
        tensors=(
            *(shard(block, name, at) for block in (0, 1) for name, at in (("q", 0), ("k", ROWS))),
            InspectedTensor("lm_head.weight", form, ()),
            InspectedTensor("odd.weight", form, (), "the engine's loader knows no weight 'odd'"),
        ),
        layers=(fused(0), fused(1)),
        unfilled=("model.bias",),
        looked_at=("model.layers.0.qkv_proj",),
        in_bf16=dict.fromkeys(("model.layers.0.down_proj", "model.layers.1.down_proj"), "keep"),
    )
    monkeypatch.setattr(diagnostics, "inspect_model", lambda path, scheme: made)
    monkeypatch.setenv("COLUMNS", "160")
    return made


def test_what_differs_by_the_block_is_one_line(inspection: Inspection) -> None:
    q, k, head, odd = lines_of(inspection)

    assert (q.name, q.target) == (
        "model.layers.{0-1}.q.weight",
        "model.layers.{0-1}.qkv_proj.weight",
    )
    assert (q.window, k.window) == ("0:4, :", "4:8, :")
    assert (q.span, k.span) == ((0.0, 0.5), (0.5, 1.0))
    assert (q.alike, q.how, q.kept_as) == (2, "in place", "float8_e4m3fn")
    assert (head.how, odd.how) == ("dropped", "refused")


def test_the_table_says_where_each_tensor_lands_and_what_goes_nowhere(
    inspection: Inspection, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["inspect", "--model", "."]) == 0

    said = capsys.readouterr().out
    assert "[4:8, :]" in said
    assert "in place 2" in said
    assert "dropped by vLLM's loader: lm_head.weight" in said
    assert "filled by no tensor: model.bias" in said
    assert "in bf16 because the entry keeps it: model.layers.{0-1}.down_proj" in said
    assert "refused: the engine's loader knows no weight 'odd'" in said
    assert "No weight was loaded" in said


def test_a_name_is_shown_with_its_layer(
    inspection: Inspection, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["inspect", "--model", ".", "layers.1.k"]) == 0

    said = capsys.readouterr().out
    assert "model.layers.1.k.weight" in said
    assert "layers.0" not in said
    assert "processed by SomeKernel" in said
    assert "weight_scale: float32 8 x 1" in said


def test_a_name_that_nothing_has_is_refused_with_the_nearest(
    inspection: Inspection, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["inspect", "--model", ".", "layers.1.kk.weight"]) == 1

    assert "did you mean 'model.layers.1.k.weight'?" in capsys.readouterr().err


def test_for_machines_it_is_everything(
    inspection: Inspection, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["inspect", "--model", ".", "--json"]) == 0
    whole = json.loads(capsys.readouterr().out)
    assert main(["inspect", "--model", ".", "--json", "layers.0.q."]) == 0
    part = json.loads(capsys.readouterr().out)

    assert len(whole["tensors"]) == 6
    assert whole["ignored"] == ["lm_head.weight"]
    assert whole["layers"][0]["reads"]["weight"] == {"dtype": "float8_e4m3fn", "shape": [8, 8]}
    assert [tensor["name"] for tensor in part["tensors"]] == ["model.layers.0.q.weight"]
    assert [layer["name"] for layer in part["layers"]] == ["model.layers.0.qkv_proj"]


def test_it_is_drawn(
    inspection: Inspection, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    pytest.importorskip("matplotlib")
    png = tmp_path / "plan.png"

    assert main(["inspect", "--model", ".", "--png", str(png)]) == 0

    assert png.read_bytes().startswith(b"\x89PNG")
    assert png.stat().st_size > 10_000


def test_what_is_no_checkpoint_is_one_line(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["inspect", "--model", str(tmp_path)]) == 1

    assert capsys.readouterr().err == (
        f"error: {tmp_path} is no folder of a checkpoint: it has no config.json\n"
    )


def test_on_a_narrow_terminal_names_stay_whole(
    inspection: Inspection, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr("flashquant.cli.output.console", lambda: Console(width=80))

    assert main(["inspect", "--model", "/models/tiny"]) == 0

    said = capsys.readouterr().out
    assert "model.layers.{0-1}.k.weight bfloat16 4 x 8, 2 times\n" in said
    assert "  -> model.layers.{0-1}.qkv_proj.weight[4:8, :]" in said
