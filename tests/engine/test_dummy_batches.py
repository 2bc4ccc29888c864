"""Data-parallel ranks run dummy batches to stay in step, in an open update as at any time.

What one computes is thrown away, so it may meet layers of two policies; a step of a request may
not. Each of vLLM's two runners has its own way to run one.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest
from vllm.v1.worker import gpu_model_runner as first
from vllm.v1.worker.gpu import model_runner as second

import flashquant
from flashquant.errors import TornWeights
from tests.engine.serving import Serving, serve
from tools.models.policies import Policies

pytestmark = pytest.mark.engine


@pytest.fixture(scope="module")
def policies(tmp_path_factory: pytest.TempPathFactory) -> Policies:
    return Policies(tmp_path_factory.mktemp("policies"), "qwen2")


@pytest.fixture(params=["open", "torn"])
def half_updated(request: pytest.FixtureRequest, policies: Policies) -> Iterator[Serving]:
    """Layers of two policies: an update is open, or failed without a way back."""
    live = serve(policies.bf16("a"), "fp8_channel")
    live.session.begin(atomic=request.param == "open")
    half = list(policies.tensors("b").items())[:14]
    live.session.push(half)
    if request.param == "torn":
        live.session.abandon()
    with pytest.raises(TornWeights):
        live.session.check_servable()
    yield live
    live.session.abandon()
    flashquant.reload_weights(live.llm, policies.tensors("a"))
    live.snapshot().assert_same(live.start)


def test_the_first_runner_runs_one(half_updated: Serving) -> None:
    """As a data-parallel engine core asks for it."""
    half_updated.llm.llm_engine.engine_core.engine_core.execute_dummy_batch()


class Reached(Exception):
    """vLLM's own method runs."""


class _StandIn:
    """Knows what it was given; at anything else, vLLM's method has been reached."""

    def __init__(self, **known: Any) -> None:
        vars(self).update(known)

    def __getattr__(self, name: str) -> Any:
        raise Reached(name)


NO_TOKENS, TOKENS = (_StandIn(total_num_scheduled_tokens=count) for count in (0, 1))


@pytest.fixture
def runners(half_updated: Serving) -> list[Any]:
    """Stand-ins with the methods of both, of the model that is half updated; nothing of theirs
    can run on them."""

    made = []
    for kind in (first.GPUModelRunner, second.GPUModelRunner):
        runner = _StandIn(get_model=lambda: half_updated.model)
        vars(runner)["run"] = kind.execute_model.__get__(runner)
        made.append(runner)
    return made


def test_the_second_runner_runs_one(runners: list[Any]) -> None:
    """Whose dummy batches pass through the method that runs requests, too."""
    with pytest.raises(Reached):
        runners[1].run(TOKENS, None, dummy_run=True, skip_attn_for_dummy_run=True)


def test_a_step_without_tokens_is_one_in_which_nothing_is_computed(runners: list[Any]) -> None:
    """Only which requests have ended is told: the engine core may come to it in an open update."""
    for runner in runners:
        with pytest.raises(Reached):
            runner.run(NO_TOKENS, None)


def test_a_step_of_a_request_is_refused_by_both(runners: list[Any]) -> None:
    for runner in runners:
        with pytest.raises(TornWeights):
            runner.run(TOKENS, None)
