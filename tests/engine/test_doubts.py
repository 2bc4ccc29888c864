"""On a GPU nobody waits for a maximum before an update is to stand; here that is pretended."""

from __future__ import annotations

from collections.abc import Iterator
from unittest import mock

import pytest
import torch

import flashquant
from flashquant.errors import MisfitTensor
from flashquant.schemes import validation as fit
from tests.engine.serving import Serving, serve
from tools.models.policies import Policies

pytestmark = pytest.mark.engine


@pytest.fixture(scope="module")
def policies(tmp_path_factory: pytest.TempPathFactory) -> Policies:
    return Policies(tmp_path_factory.mktemp("policies"), "qwen2")


@pytest.fixture(params=["bf16", "int8", "fp8_vllm", "fp8_channel"])
def live(request: pytest.FixtureRequest, policies: Policies) -> Iterator[Serving]:
    """An engine on policy A, on a device that would have to be waited for."""
    serving = serve(policies.bf16("a"), request.param)
    flashquant.reload_weights(serving.llm, policies.tensors("a"))
    with mock.patch.object(fit, "is_at_hand", return_value=False):
        yield serving


@pytest.mark.parametrize("prepare", [False, True])
@pytest.mark.parametrize("at", [0, 5, -1])
def test_a_nan_is_found_at_the_end_and_everything_taken_back(
    live: Serving, policies: Policies, at: int, prepare: bool
) -> None:
    weights = policies.tensors("b")
    name = list(weights)[at]
    weights[name] = torch.full_like(weights[name], torch.nan)

    with pytest.raises(MisfitTensor, match=name):
        flashquant.reload_weights(live.llm, weights, prepare=prepare)

    live.snapshot().assert_same(live.start)
    report = flashquant.reload_weights(live.llm, policies.tensors("b"), prepare=prepare)
    assert report.digest == serve(policies.bf16("b"), live.scheme).start.digest


def test_a_push_by_itself_is_looked_at_before_it_returns(live: Serving, policies: Policies) -> None:
    name = "model.layers.0.self_attn.o_proj.weight"
    bad = torch.full_like(policies.tensors("b")[name], torch.inf)

    with pytest.raises(MisfitTensor, match="infinite"):
        live.model.load_weights([(name, bad)])

    live.snapshot().assert_same(live.start)
