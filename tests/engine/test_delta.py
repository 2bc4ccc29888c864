"""Codes made by a sender, and what changed of them, on the real engine."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
import torch

import flashquant
from flashquant.sender import Manifest
from tests.engine.serving import Serving, serve
from tools.models.policies import Policies

pytestmark = pytest.mark.engine

CODES = {"int8": torch.int8, "fp8_channel": torch.float8_e4m3fn}
O_PROJ = "model.layers.0.self_attn.o_proj.weight"


@pytest.fixture(scope="module")
def policies(tmp_path_factory: pytest.TempPathFactory) -> Policies:
    return Policies(tmp_path_factory.mktemp("policies"), "qwen2")


@pytest.fixture(params=list(CODES))
def live(request: pytest.FixtureRequest, policies: Policies) -> Iterator[Serving]:
    serving = serve(policies.bf16("a"), request.param)
    flashquant.reload_weights(serving.llm, policies.tensors("a"))
    yield serving
    flashquant.reload_weights(serving.llm, policies.tensors("a"))


def test_an_engine_says_the_same_of_what_it_wants_through_every_target(live: Serving) -> None:
    worker = live.llm.llm_engine.model_executor.driver_worker.worker

    manifest = flashquant.manifest(live.llm)

    assert isinstance(manifest, Manifest)
    assert flashquant.manifest(worker) == flashquant.manifest(live.model) == manifest
    assert manifest.tensors[O_PROJ].torch_dtype == CODES[live.scheme]
    assert manifest.tensors[f"{O_PROJ}_scale"].shape == (256, 1)
