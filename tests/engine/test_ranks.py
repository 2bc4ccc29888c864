"""Tensor parallel over two processes: both ranks commit, or neither does."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch

from flashquant.patches.guard import vllm_is
from flashquant.profiles import save_profile
from flashquant.profiles.making import Factors, profile_of
from tests.engine.kernels import NO_AMX_KERNELS, WORKER_KERNELS, has_amx_kernels, want_int4
from tests.engine.processes import CORES, assert_lost, run, run_program
from tests.engine.serving import BY_EXPERTS, FP8_CHANNEL, needs
from tools.models.policies import Policies

pytestmark = pytest.mark.engine
STACKED_W13 = ("stacked_experts",) if vllm_is(">=0.25") else ()  # Mixtral's loader knows them
WHOLE_ROWS = needs(">=0.28", "scales of whole rows over ranks")


@pytest.fixture(scope="module")
def policies(tmp_path_factory: pytest.TempPathFactory) -> Policies:
    return Policies(tmp_path_factory.mktemp("policies"), "qwen2")


@pytest.mark.parametrize(
    "scheme",
    [
        "int8",
        "fp8_vllm",
        pytest.param("fp8_channel", marks=needs(">=0.28", "scales of whole rows over ranks")),
        pytest.param("fp8_tensor", marks=FP8_CHANNEL),
        "int4 by a profile",
        pytest.param("nvfp4 beside int4 and int8", marks=WHOLE_ROWS),
    ],
)
def test_two_workers_commit_together_or_not_at_all(policies: Policies, scheme: str) -> None:
    """Tensor parallel: rank 1 fails alone, and is then killed in the middle of an update."""
    place = "cache" if scheme == "fp8_vllm" else "host"
    answer = run_program(
        "tensor_parallel",
        policies,
        FLASHRL_CONFIG=written(policies, scheme) if " " in scheme else scheme,
        FLASHQUANT_UNDO=place,
        FLASHQUANT_EMULATE="1",
        VLLM_ENABLE_V1_MULTIPROCESSING="1",
        VLLM_ALLOW_INSECURE_SERIALIZATION="1",  # to send the workers a fault
        VLLM_CPU_OMP_THREADS_BIND=CORES,
    )

    steps = answer["steps"]
    assert answer["borrowed"] == (place == "cache")  # where all of the undo log lay
    assert answer["reported"] == steps["pushed b"] != steps["started on a"]
    assert len(set(steps["pushed b"])) == 2  # each rank holds a shard of its own
    assert answer["failed"][:2] == ["ReloadError", "rank 1: MemoryError: injected"]
    assert steps["rank 1 failed"] == steps["pushed b"]
    assert steps["pushed a"] == steps["started on a"]  # equal to a fresh start, per rank
    assert "rank 1 did not commit this update (MemoryError" in answer["refused"][1]
    assert steps["rank 1 failed in vLLM's reload"] == steps["started on a"]
    assert steps["pushed b by vLLM's reload"] == steps["pushed b"]
    assert_lost(answer["lost"], rank=1)


def written(policies: Policies, scheme: str) -> str:
    """A file of one entry: of several schemes, or of one and a profile of policy A."""
    want_int4("int4")
    entry: dict[str, object] = {"fn": scheme.split()[0]}
    if scheme.endswith("profile"):
        dice, policy = torch.Generator().manual_seed(0), policies.tensors("a")
        layers = {n: (len(w), w.shape[1] // 128) for n, w in policy.items() if "_proj.weight" in n}
        held = {
            name: torch.randint(60, 111, shape, dtype=torch.uint8, generator=dice)
            for name, shape in layers.items()
        }
        made = profile_of(
            Factors(), policy.items(), dict.fromkeys(layers), "a", scheme="int4", held=held
        )
        save_profile(made, policies.folder / "int4.safetensors")
        entry["profile"] = "int4.safetensors"
    else:
        cut_by_columns = {"match": "model.layers.0.self_attn.o_proj", "fn": "int4"}
        entry["overrides"] = [cut_by_columns, {"match": {"last": 1}, "fn": "int8"}]
    path = policies.folder / f"{len(scheme)}.yaml"
    path.write_text(json.dumps({"configs": [entry]}))  # JSON is YAML
    return str(path)


@pytest.mark.parametrize(
    ("kind", "scheme", "cut", "expert", "more"),
    [
        pytest.param(
            *("qwen3-moe", "int8", "experts", "mlp.experts.7.up_proj", ("stacked_experts",)),
            marks=BY_EXPERTS,
        ),
        ("mixtral", "bf16", "tensors", "block_sparse_moe.experts.7.w3", STACKED_W13),
        pytest.param(
            *("deepseek-v2", "fp8_block", "experts", "mlp.experts.7.up_proj", ()),
            marks=BY_EXPERTS,
        ),
    ],
)
def test_two_ranks_of_a_mixture_hold_what_a_fresh_start_does(
    tmp_path: Path, kind: str, scheme: str, cut: str, expert: str, more: tuple[str, ...]
) -> None:
    """However they are pushed to, with parts of all experts or all of some; or they stay old."""
    if scheme != "bf16" and not has_amx_kernels():
        pytest.skip(NO_AMX_KERNELS)
    name, mixture = f"model.layers.1.{expert}.weight", Policies(tmp_path, kind)
    answer = run(
        *("mixtures", mixture.bf16("a"), mixture.bf16("b"), cut, name, *more),
        FLASHRL_CONFIG=scheme,
        **{WORKER_KERNELS: "native" if scheme == "bf16" else "amx"},
        VLLM_ENABLE_V1_MULTIPROCESSING="1",
        VLLM_ALLOW_INSECURE_SERIALIZATION="1",  # to send the workers a fault
        VLLM_CPU_OMP_THREADS_BIND=CORES,
    )

    start, pushes, failures = answer["start"], answer["pushes"], answer["failures"]
    (b, _), *_ = pushes.values()
    assert {held for rank in answer["experts"] for held in rank} == {8 if cut == "experts" else 16}
    assert len(set(b[0])) == 2  # each rank holds a shard of its own
    assert b[0] != start[0]
    assert b[1] != start[1]
    assert [way for way, held in pushes.items() if held != [b, start]] == []
    assert len(pushes) == 8 + len(more)
    assert {way: ranks for way, (_, ranks) in failures.items()} == dict.fromkeys(failures, start[0])
    raised = {way: (error, says) for way, ((error, says, _), _) in failures.items()}
    assert raised.pop("rank 1 fails") == ("ReloadError", "rank 1: MemoryError: injected")
    assert len(raised) == 3
    assert all(f"{name} holds NaN" in says for _, says in raised.values())
    assert all(seconds < 30 for ((_, _, seconds), _) in failures.values())
    assert answer["afterwards"] == b
    assert_lost(answer["lost"], rank=1)


@pytest.mark.parametrize(
    ("kind", "scheme", "cut"),
    [
        ("qwen2", "int8", "tensors"),
        ("qwen2", "fp8_vllm", "tensors"),
        pytest.param("qwen3-moe", "int8", "experts", marks=BY_EXPERTS),
    ],
)
def test_ranks_of_their_own_commit_together_or_not_at_all(
    tmp_path: Path, kind: str, scheme: str, cut: str
) -> None:
    """external_launcher: no front end in common, each program pushes to its own worker."""
    amx = cut == "experts" and has_amx_kernels()
    policies = Policies(tmp_path, kind)
    answer = run(
        *("external_launcher", policies.bf16("a"), policies.bf16("b"), cut),
        ranks=2,
        FLASHRL_CONFIG=scheme if cut == "tensors" or amx else "bf16",
        **{WORKER_KERNELS: "amx" if amx else "native"},
        VLLM_CPU_OMP_THREADS_BIND=CORES,
        GLOO_SOCKET_IFNAME="lo",
    )

    assert {n for held in answer["experts"] for n in held} == ({8} if cut == "experts" else set())
    assert len(set(answer["pushed b"])) == 2  # each rank holds a shard of its own
    assert answer["pushed b"] != answer["started on a"]
    (followed, why), (failed, _) = answer["raised"]
    assert (followed, failed) == ("PeerFailed", "MemoryError")
    assert "rank 1 did not commit this update (MemoryError: injected)" in why
    assert answer["rank 1 failed"] == answer["pushed b"]
    assert answer["pushed a"] == answer["started on a"]  # equal to a fresh start, per rank
