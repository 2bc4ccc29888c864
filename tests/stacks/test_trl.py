"""TRL 1.16.0: GRPO with the colocated engine, all of it TRL's own code; and its server mode.

The colocated engine is compiled, as TRL starts it.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from tests.stacks import overlays
from tests.stacks.running import fresh, run
from tools.models import short_smollm2
from tools.models.policies import Policies

pytestmark = overlays.needed("trl")


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return short_smollm2.make(tmp_path_factory.mktemp("trl") / "model")


@overlays.on_each_vllm("trl")
@pytest.mark.parametrize(
    ("scheme", "dtype"), [("int8", "bfloat16"), ("int8", "float32"), ("fp8_vllm", "bfloat16")]
)
def test_a_step_of_grpo_rolls_out_the_policy_it_has_just_made(
    model: Path, tmp_path: Path, scheme: str, dtype: str, vllm: str
) -> None:
    """float32 is what TRL trains in where it is not told otherwise; so are its pushes then."""
    answer = run(
        "trl",
        "trl_grpo",
        model,
        dtype,
        tmp_path,
        scheme=scheme,
        vllm=vllm,
        TORCHDYNAMO_DISABLE="0",  # TRL's engine is compiled; it has no setting for eager
        VLLM_CPU_KVCACHE_SPACE="1",
    )

    first, second = answer["generated with"]
    assert min(answer["gradients"]) > 0
    assert first == answer["started"]["digest"]
    assert second == answer["fresh on step 1"]["digest"] != first
    assert answer["after two steps"] == answer["fresh on step 1"]
    assert answer["synced"] == answer["fresh on step 2"] != answer["after two steps"]
    assert answer["refused"][0] == "MisfitTensor"
    assert answer["after refusal"] == answer["synced again"] == answer["synced"]


@overlays.on_each_vllm("trl")
@pytest.mark.parametrize("scheme", ["int8", "fp8_vllm"])
def test_what_its_client_sends_a_server_equals_a_fresh_start(
    policies: Policies, scheme: str, vllm: str
) -> None:
    """Through vLLM's own transfer by NCCL; a refused push leaves nobody waiting."""
    paths = (policies.bf16("a"), policies.bf16("b"))
    answer = run("trl", "trl_server", *paths, scheme=scheme, vllm=vllm)

    a, b = (said_in_answers(one) for one in fresh("trl", policies, scheme=scheme, vllm=vllm))
    assert answer["started"] == answer["pushed a"] == a
    assert answer["pushed b"] == answer["after refusal"] == b
    # TRL sends the request again, for which nothing is started any more.
    assert answer["refused"][0] == "RetryError"


def said_in_answers(engine: dict[str, Any]) -> dict[str, Any]:
    """What an engine said, without the log-probs of its prompts."""
    both = zip(engine["tokens"], engine["logprobs"], strict=True)
    return {**engine, "logprobs": [logprobs[-len(tokens) :] for tokens, logprobs in both]}
