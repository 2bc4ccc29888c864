"""A folder is read by `flashquant.reload_weights` as vLLM's own loader reads it."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file
from torch import Tensor

import flashquant
from flashquant.errors import UnknownWeight
from tests.engine.serving import serve
from tools.models.policies import Policies

pytestmark = pytest.mark.engine


@pytest.fixture(scope="module")
def policies(tmp_path_factory: pytest.TempPathFactory) -> Policies:
    return Policies(tmp_path_factory.mktemp("policies"), "qwen2")


def sharded(weights: dict[str, Tensor], folder: Path) -> Path:
    """Two files and their index."""
    names = sorted(weights)
    files = {"model-00001-of-00002": names[::2], "model-00002-of-00002": names[1::2]}
    for file, held in files.items():
        save_file({name: weights[name] for name in held}, folder / f"{file}.safetensors")
    listed = {name: f"{file}.safetensors" for file, held in files.items() for name in held}
    (folder / "model.safetensors.index.json").write_text(json.dumps({"weight_map": listed}))
    return folder


@pytest.mark.parametrize(
    "beside", ["model-00003-of-00003", "consolidated", "adapter_model"], ids=str
)
def test_what_lies_beside_the_checkpoint_changes_nothing(
    policies: Policies, tmp_path: Path, beside: str
) -> None:
    """A shard of an older checkpoint; the same one in Mistral's format; an adapter."""
    a, b = policies.tensors("a"), policies.tensors("b")
    extra = {
        "model-00003-of-00003": dict(list(a.items())[-5:]),
        "consolidated": b,
        "adapter_model": {"base_model.lora_A": a["model.norm.weight"]},
    }[beside]
    shutil.copy(policies.bf16("b") / "config.json", tmp_path)
    save_file(extra, sharded(b, tmp_path) / f"{beside}.safetensors")
    live, b_fresh = serve(policies.bf16("a"), "int8"), serve(policies.bf16("b"), "int8").start

    flashquant.reload_weights(live.llm, a)
    live.llm.collective_rpc("reload_weights", kwargs={"weights_path": str(tmp_path)})
    by_vllm = flashquant.status(live.llm).digest
    flashquant.reload_weights(live.llm, a)
    flashquant.reload_weights(live.llm, tmp_path)

    assert flashquant.status(live.llm).digest == by_vllm == b_fresh.digest


def test_a_tensor_that_no_engine_knows_is_blamed_on_its_file(
    policies: Policies, tmp_path: Path
) -> None:
    live, b = serve(policies.bf16("a"), "int8"), policies.tensors("b")
    save_file({**b, "model.typo.weight": torch.ones(256)}, tmp_path / "model.safetensors")

    for prepare in (False, True):
        with pytest.raises(UnknownWeight, match=rf"typo.*{tmp_path}/model\.safetensors"):
            flashquant.reload_weights(live.llm, tmp_path, prepare=prepare)
