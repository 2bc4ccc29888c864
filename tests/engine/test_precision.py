"""A trainer may push float32 or float16: what is served is what a fresh start on them serves."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file
from torch import Tensor

import flashquant
from flashquant.errors import MisfitTensor
from tests.engine.serving import Serving, choosing, serve
from tools.models.policies import Policies

pytestmark = pytest.mark.engine

SCHEMES = ("bf16", "int8", "fp8_vllm", "fp8_channel")
DTYPES = {"float32": torch.float32, "float16": torch.float16}


@pytest.fixture(scope="module")
def policies(tmp_path_factory: pytest.TempPathFactory) -> Policies:
    return Policies(tmp_path_factory.mktemp("policies"), "qwen2")


def master_weights(policies: Policies, dtype: str) -> tuple[Path, dict[str, Tensor]]:
    """Policy B in a precision in which it is no bf16 number; and the checkpoint of it."""
    dice = torch.Generator().manual_seed(7)
    weights = {
        name: (t.float() * (1 + 1e-3 * torch.randn(t.shape, generator=dice))).to(DTYPES[dtype])
        for name, t in sorted(policies.tensors("b").items())
    }
    path = policies.folder / f"qwen2-b-{dtype}"
    if not path.exists():
        shutil.copytree(policies.bf16("b"), path)
        save_file(weights, path / "model.safetensors", metadata={"format": "pt"})
        config = path / "config.json"
        config.write_text(json.dumps(json.loads(config.read_text()) | {"dtype": dtype}))
    return path, weights


def at_once(live: Serving, path: Path, weights: dict[str, Tensor]) -> None:
    flashquant.reload_weights(live.llm, weights)
    flashquant.reload_weights(live.llm, weights)  # the second time, by the short way


def by_path(live: Serving, path: Path, weights: dict[str, Tensor]) -> None:
    flashquant.reload_weights(live.llm, path, prepare=True)


def one_by_one(live: Serving, path: Path, weights: dict[str, Tensor]) -> None:
    for pair in weights.items():
        live.model.load_weights([pair])


@pytest.mark.parametrize("kernels", ["native", "portable"])
@pytest.mark.parametrize("scheme", SCHEMES)
@pytest.mark.parametrize("dtype", DTYPES)
def test_whatever_the_precision_a_push_is_a_fresh_start_on_the_same_file(
    policies: Policies, scheme: str, dtype: str, kernels: str
) -> None:
    path, weights = master_weights(policies, dtype)
    with choosing(kernels):
        live, fresh = serve(policies.bf16("a"), scheme, kernels), serve(path, scheme, kernels)
        for push in (at_once, by_path, one_by_one):
            flashquant.reload_weights(live.llm, policies.tensors("a"))

            push(live, path, weights)

            live.snapshot().assert_same(fresh.start)


@pytest.mark.parametrize("scheme", ["fp8_channel", "bf16"])
def test_what_bf16_cannot_hold_is_refused_by_name(policies: Policies, scheme: str) -> None:
    """float32 goes a little further; rounded, such a weight would be infinite."""
    live = serve(policies.bf16("a"), scheme)
    flashquant.reload_weights(live.llm, policies.tensors("a"))
    name = "model.layers.0.self_attn.o_proj.weight"
    weights = policies.tensors("b")
    wrong = weights[name].float()
    wrong[3, 5] = torch.finfo(torch.float32).max

    for _ in range(2):
        with pytest.raises(MisfitTensor, match=name):
            flashquant.reload_weights(live.llm, weights | {name: wrong})

    live.snapshot().assert_same(serve(policies.bf16("a"), scheme).start)
