"""TRL 1.16.0: GRPO with the colocated engine, all of it TRL's own code.

The engine is compiled, as TRL starts it.
"""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.stacks import overlays
from tests.stacks.running import run
from tools.models import short_smollm2

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
