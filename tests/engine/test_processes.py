"""The plugin in processes of its own: workers elsewhere, replicas, Ray's actors."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import pytest

from tests.engine.processes import CORES, assert_lost, run, run_program
from tests.engine.serving import BY_EXPERTS, BY_ROW, WEIGHT_VERSIONS, Serving, serve
from tools.models.policies import Policies

pytestmark = pytest.mark.engine


@pytest.fixture(scope="module")
def policies(tmp_path_factory: pytest.TempPathFactory) -> Policies:
    return Policies(tmp_path_factory.mktemp("policies"), "qwen2")


def test_workers_in_other_processes_hold_what_an_engine_in_this_one_holds(
    policies: Policies,
) -> None:
    """vLLM's default (multiprocess) engine, patched by the environment variable alone."""
    answer = run_program(
        "other_processes",
        policies,
        FLASHRL_CONFIG="int8",
        VLLM_ENABLE_V1_MULTIPROCESSING="1",
        VLLM_ALLOW_INSECURE_SERIALIZATION="1",  # to send the worker a fault
    )

    here = [serve(policies.bf16(policy), "int8").start for policy in ("a", "b")]
    assert answer["before"] == here[0].digest
    assert answer["report"] == answer["after"] == answer["by one buffer"] == here[1].digest
    assert answer["tokens"] == here[1].outputs.tokens[0]
    assert answer["version"] == "1"
    assert answer["refused"][0] == "UnknownWeight"
    assert answer["refused"][1].startswith("the engine's loader knows no weight 'typo'")
    assert answer["tore"][0] == "UnknownWeight"
    assert answer["torn"]
    assert answer["said while torn"] == ["error", []]  # refused, and the engine lives
    assert answer["healed"] == answer["tokens"]
    assert_lost(answer["lost"], rank=0)


@pytest.fixture(scope="module")
def asynchronous(policies: Policies) -> dict[str, Any]:
    """Eleven updates of an `AsyncLLM`: of four clients, and of one answer by itself."""
    return run_program(
        "asynchronous",
        policies,
        FLASHRL_CONFIG=BY_ROW,
        VLLM_ALLOW_INSECURE_SERIALIZATION="1",
    )


def test_an_async_engine_is_updated_while_clients_generate(
    asynchronous: dict[str, Any], policies: Policies
) -> None:
    """No request fails, and one in flight goes on as a fresh engine would."""
    a, b = (serve(policies.bf16(policy), BY_ROW) for policy in ("a", "b"))
    assert asynchronous["failed"] == []
    assert asynchronous["before"] == a.start.digest
    assert asynchronous["after"] == asynchronous["reported"] == b.start.digest
    assert asynchronous["version"] == 11
    start = asynchronous["updated"] + 4  # what the client had, and what was on its way to it
    assert 0 < start < 64
    assert_continues(asynchronous["said"], start, b)
    assert asynchronous["refused"][0] == "UnknownWeight"
    assert_lost(asynchronous["lost"], rank=0)


@WEIGHT_VERSIONS
def test_an_async_engine_tells_which_version_sampled_which_token(
    asynchronous: dict[str, Any], policies: Policies
) -> None:
    """From the very first token of the new one."""
    assert max(len(spans) for spans in asynchronous["spans"]) > 1  # answers saw updates come
    (_, _, cut), (version, start, _) = asynchronous["in flight"]
    assert (version, cut) == ("11", start)
    assert start <= asynchronous["updated"] + 4
    assert_continues(asynchronous["said"], start, serve(policies.bf16("b"), BY_ROW))


def assert_continues(said: list[list[float]], start: int, fresh: Serving) -> None:
    """What came after the update is what a fresh engine says after the same tokens."""
    tokens = [int(token) for token, _ in said]
    prompt = list(range(5, 45)) + tokens[:start]
    assert said[start:] == fresh.continued(prompt, len(said) - start)


def test_replicas_take_the_entries_of_a_file_in_turn(policies: Policies, tmp_path: Path) -> None:
    """One front end, two data-parallel ranks, int8 and bf16; one push reaches both."""
    file = tmp_path / "mixed.yaml"
    file.write_text("configs: [{fn: int8}, {fn: bf16}]")
    answer = run_program(
        "replicas",
        policies,
        FLASHRL_CONFIG=str(file),
        VLLM_ENABLE_V1_MULTIPROCESSING="1",
        VLLM_CPU_OMP_THREADS_BIND=CORES,
    )

    schemes = ("int8", "bf16")
    a, b = ([serve(policies.bf16(policy), s).start for s in schemes] for policy in "ab")
    assert answer["scheme"] == "int8, bf16"
    assert answer["before"] == [start.digest for start in a]
    assert answer["reported"] == answer["after"] == [start.digest for start in b]
    assert answer["tokens"] == [start.outputs.tokens[0] for start in b]


@pytest.mark.parametrize("cut", [pytest.param("experts", marks=BY_EXPERTS)])
def test_replicas_that_share_experts_take_an_update_together_or_not_at_all(
    tmp_path: Path, cut: str
) -> None:
    """No token is made of two policies, whoever generates, fails alone, or is a step behind."""
    mixture = Policies(tmp_path, "qwen3-moe")
    answer = run(
        *("mixed_replicas", mixture.bf16("a"), mixture.bf16("b"), cut),
        FLASHRL_CONFIG="bf16",
        VLLM_ENABLE_V1_MULTIPROCESSING="1",
        VLLM_ALLOW_INSECURE_SERIALIZATION="1",  # to send the workers a fault
        VLLM_CPU_OMP_THREADS_BIND=CORES,
    )

    start, a, b = answer["start"], answer["a"], answer["b"]
    pushes = {name: told for name, told in answer.items() if "met" in told}
    assert a != b
    assert answer["a again"] == a
    assert answer["b again"] == b
    ends = {name: "b" if told["ranks"] != start else "a" for name, told in pushes.items()}
    assert ends == {"both run": "b", "prepared": "a", "one fails": "a", "one runs": "b"}
    assert all(told["met"] and told["said"] == told["anew"] for told in pushes.values())
    refused = {name: told["refused"][:2] for name, told in pushes.items()}
    assert refused.pop("one fails") == ["ReloadError", "rank 1: MemoryError: injected"]
    assert all(kind == "nothing" for kind, _ in refused.values())
    assert answer["split"][0] == "TornWeights"
    assert answer["asked"] == [[], []]
    assert answer["healed"] == [start, a]
    assert answer["by a delta"] == [pushes["one runs"]["ranks"], b]


def test_an_engine_in_a_ray_actor_is_patched_and_so_is_rays_worker(
    policies: Policies, tmp_path: Path
) -> None:
    """Set by the environment alone; every process says so in the log."""
    log = tmp_path / "flashquant.log"
    answer = run_program(
        "ray_actors",
        policies,
        FLASHRL_CONFIG="int8",
        FLASHRL_LOGGING_FILE=str(log),
        VLLM_ENABLE_V1_MULTIPROCESSING="1",
    )

    a, b = (serve(policies.bf16(policy), "int8") for policy in "ab")
    worker = answer["worker"]
    assert answer["before"] == worker["before"] == a.start.digest
    assert answer["reported"] == answer["after"] == b.start.digest
    assert worker["reported"] == worker["after"] == b.start.digest
    assert answer["tokens"] == b.start.outputs.tokens[0]
    processes = {*answer["processes"], worker["process"]}
    assert len(processes) == 4  # the driver, the actor, its engine core, the worker
    patched = re.findall(r"\[(\d+)\].*: patched \d+ points", log.read_text())
    assert processes <= set(map(int, patched))
