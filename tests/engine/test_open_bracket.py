"""An update under way whose trainer is slow, gone, or replaced: no step runs, and nothing dies."""

from __future__ import annotations

import time
from typing import Any

import pytest

import flashquant
from flashquant.errors import TornWeights
from flashquant.patches.seams.loading import check_servable
from tests.engine import processes
from tests.engine.programs.open_bracket import LONG, SHORT
from tests.engine.serving import Serving, serve
from tools.models.policies import Policies

pytestmark = pytest.mark.engine

SCHEME = "int8"
PROMPT = list(range(5, 45))


@pytest.fixture(scope="module")
def policies(tmp_path_factory: pytest.TempPathFactory) -> Policies:
    return Policies(tmp_path_factory.mktemp("policies"), "qwen2")


@pytest.fixture(scope="module")
def fresh(policies: Policies) -> dict[str, Serving]:
    return {name: serve(policies.bf16(name), SCHEME) for name in "ab"}


@pytest.fixture(scope="module")
def told(policies: Policies) -> dict[str, Any]:
    """An `AsyncLLM` whose engine core, and its worker, live in processes of their own."""
    return processes.run(
        "open_bracket",
        policies.bf16("a"),
        policies.bf16("b"),
        FLASHRL_CONFIG=SCHEME,
        FLASHQUANT_BRACKET_TIMEOUT="10",
        FLASHQUANT_UNDO="cache",
        VLLM_ALLOW_INSECURE_SERIALIZATION="1",  # to ask where the log lies
        VLLM_ENABLE_V1_MULTIPROCESSING="1",
    )


def says(serving: Serving) -> list[float]:
    return [token for token, _ in serving.continued(PROMPT, SHORT)]


@pytest.mark.parametrize(
    "act",
    [
        "nothing",
        "its client gives up",
        "both clients give up",
        "status",
        "resume",
        "pause, keeping requests",
        "pause, aborting requests",
        "sleep",
        "caches are reset",
        "all of it",
    ],
)
def test_no_step_runs_in_an_open_bracket_whatever_is_done_meanwhile(
    told: dict[str, Any], fresh: dict[str, Serving], act: str
) -> None:
    """One request was in flight, one came later; afterwards the engine serves the new policy."""
    came, after = told["acts"][act]

    assert came == 0
    assert after == says(fresh["b"])


@pytest.mark.parametrize("way", ["finish", "start", "flashquant.reload_weights", "reload_weights"])
def test_whoever_comes_next_ends_an_update_that_its_trainer_has_left(
    told: dict[str, Any], fresh: dict[str, Serving], way: str
) -> None:
    """A request that waited is answered, by the weights that are served then."""
    assert told["ways"][way] == [fresh["b"].start.digest, says(fresh["b"])]


def test_an_update_that_its_trainer_has_left_is_rolled_back_in_time(
    told: dict[str, Any], fresh: dict[str, Serving]
) -> None:
    """By itself; the request that waited is answered by the old weights."""
    assert told["a"] == told["ways"]["nobody"] == [fresh["a"].start.digest, says(fresh["a"])]


def test_in_the_callers_own_process_the_next_step_takes_it_back(
    policies: Policies, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Where nothing waits, nothing else could."""
    monkeypatch.setenv("FLASHQUANT_BRACKET_TIMEOUT", "0.5")
    live = serve(policies.bf16("a"), SCHEME, seed=4)  # an engine of its own
    weights = list(policies.tensors("b").items())
    live.session.begin()
    live.session.push(weights[: len(weights) // 2])
    with pytest.raises(TornWeights):
        check_servable(live.model)
    assert flashquant.status(live.llm).quiet is not None

    time.sleep(0.6)

    live.snapshot().assert_same(live.start)
    assert flashquant.status(live.llm).quiet is None


def test_a_trainer_that_was_taken_to_be_gone_cannot_go_on_in_the_middle(
    told: dict[str, Any],
) -> None:
    """Half an update would go live, layer by layer; it is told to begin anew."""
    pushed, finished = told["late"]

    assert "this update failed and was rolled back" in pushed
    assert "start_weight_update" in finished
    assert told["after"] == told["a"]


def test_the_undo_log_of_each_lay_in_the_kv_cache(told: dict[str, Any]) -> None:
    """So all of the above is said of that, too: what comes next finds it empty, and intact."""
    assert len(told["borrowed"]) == len(told["acts"]) + len(told["ways"])
    assert all(told["borrowed"])


def test_the_program_asks_for_more_than_comes_before_a_bracket_is_open() -> None:
    """Or no request would be in flight in it."""
    assert LONG > 8 * SHORT
