"""Pipeline parallel over two processes: each stage takes its own layers; both commit, or neither.

vLLM's CPU worker makes no room for what a stage takes from the one before it: unpatched vLLM
0.32.0 fails at the first batch. Here there is room (`kernels.make_room_between_stages`). bf16 and
int8 alone pass as well; they are left out for their half minute each.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

import flashquant
from tests.engine.kernels import WORKER_KERNELS, choosing
from tests.engine.processes import CORES, run
from tests.engine.programs.engine import PROMPT
from tests.engine.serving import BY_ROW, Serving, serve
from tools.models import tiny_models

pytestmark = pytest.mark.engine


# Each stage has something that the other has nothing of: a layer that is kept, another scheme.
ENTRY = {
    "fn": "int8",
    "keep": ["model.layers.0.self_attn.o_proj"],
    "overrides": [{"match": "model.layers.1.mlp", "fn": "fp8_channel"}],
}


@pytest.fixture(scope="module")
def scheme(tmp_path_factory: pytest.TempPathFactory) -> str:
    if BY_ROW != "fp8_channel":
        return "int8"
    path = tmp_path_factory.mktemp("entry") / "mixed.yaml"
    path.write_text(json.dumps({"configs": [ENTRY]}))  # JSON is YAML
    return str(path)


@pytest.fixture(scope="module")
def checkpoints(tmp_path_factory: pytest.TempPathFactory) -> list[Path]:
    """With a tied head, which the last stage has as embeddings of its own."""
    folder = tmp_path_factory.mktemp("policies")
    return [tiny_models.make("qwen3", seed, folder / p, tied=True) for seed, p in enumerate("ab")]


@pytest.fixture(scope="module")
def told(scheme: str, checkpoints: list[Path]) -> dict[str, Any]:
    return run(
        *("stages", *checkpoints),
        FLASHRL_CONFIG=scheme,
        **{WORKER_KERNELS: "portable"},
        VLLM_ENABLE_V1_MULTIPROCESSING="1",
        VLLM_ALLOW_INSECURE_SERIALIZATION="1",  # to send the workers a fault
        VLLM_CPU_OMP_THREADS_BIND=CORES,
    )


@pytest.fixture(scope="module")
def fresh(scheme: str, checkpoints: list[Path]) -> list[Serving]:
    """Engines that hold all layers themselves."""
    with choosing("portable"):
        return [serve(path, scheme, "portable") for path in checkpoints]


def test_stages_hold_and_say_what_one_engine_with_all_layers_does(
    told: dict[str, Any], fresh: list[Serving]
) -> None:
    for policy, whole in zip("ab", fresh, strict=True):
        held, said, _ = told[policy]
        right = flashquant.status(whole.llm).parameters
        by_rank = [name.partition(": ")[::2] for name in held]
        assert {f"rank {rank}" for rank in range(2)} == {rank for rank, _ in by_rank}
        assert {name for _, name in by_rank} >= set(right)
        assert [n for rank, n in by_rank if held[f"{rank}: {n}"] != right.get(n, "")] == []
        assert said == [token for token, _ in whole.continued(PROMPT["prompt_token_ids"], 4)]


def test_what_one_stage_keeps_or_has_in_another_scheme_is_told(
    told: dict[str, Any], fresh: list[Serving]
) -> None:
    whole = flashquant.status(fresh[0].llm)

    assert told["in_bf16"] == whole.in_bf16
    assert told["overrides"] == whole.overrides
    if BY_ROW == "fp8_channel":
        block = "model.layers.1.mlp"
        assert set(told["overrides"]) == {f"{block}.{p}_proj" for p in ("gate", "up", "down")}


def test_however_they_are_pushed_to(told: dict[str, Any]) -> None:
    a, b = told["a"], told["b"]
    assert a != b
    assert told["pushes"] == [a, b, a, b]


def test_bundles_bring_each_stage_its_own(told: dict[str, Any]) -> None:
    """A whole one, and what changed."""
    assert told["by deltas"] == [told["a"], told["b"]]


def test_nothing_that_one_of_them_takes_is_reported_as_ignored(told: dict[str, Any]) -> None:
    assert told["ignored"] == []


def test_the_layers_of_both_stages_are_in_the_report_and_the_status(
    told: dict[str, Any], fresh: list[Serving]
) -> None:
    status = flashquant.status(fresh[0].llm)
    layers = {*status.direct, *status.staged, *status.fallback}
    assert layers <= set(told["layers"]["status"])
    assert layers <= set(told["layers"]["report"])


def test_a_stage_that_fails_or_lacks_something_takes_both_back(told: dict[str, Any]) -> None:
    failed, incomplete = told["failed"], told["incomplete"]
    assert failed[:2] == ["ReloadError", "rank 1: MemoryError: injected"]
    assert incomplete[0] == "IncompleteUpdate"
    assert "model.norm.weight" in incomplete[1]
    assert told["after"] == told["last"] == told["b"]
