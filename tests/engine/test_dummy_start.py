"""Engines that start on dummy weights, as verl starts them, and are sent everything then."""

from __future__ import annotations

import json
from typing import Any

import pytest
import torch

import flashquant
from tests.engine.kernels import want_int4
from tests.engine.serving import FP8_CHANNEL, serve
from tools.models.policies import Policies

pytestmark = pytest.mark.engine

ENTRIES: dict[str, dict[str, Any]] = {
    "kept layers": {"fn": "int8", "keep": ["*.down_proj"]},
    "another scheme": {"fn": "int8", "overrides": [{"match": "*.down_proj", "fn": "fp8_channel"}]},
    "int4": {"fn": "int4", "keep": ["*.o_proj"]},
}


@pytest.fixture(scope="module")
def policies(tmp_path_factory: pytest.TempPathFactory) -> Policies:
    return Policies(tmp_path_factory.mktemp("policies"), "qwen2")


def written(policies: Policies, entry: dict[str, Any]) -> str:
    path = policies.folder / f"{abs(hash(json.dumps(entry)))}.yaml"
    path.write_text(json.dumps({"configs": [entry]}))
    return str(path)


@pytest.mark.parametrize(
    "entry",
    [
        pytest.param(entry, id=name, marks=FP8_CHANNEL if "overrides" in entry else ())
        for name, entry in ENTRIES.items()
    ],
)
def test_what_is_pushed_is_what_a_start_on_it_serves(
    policies: Policies, entry: dict[str, Any]
) -> None:
    want_int4(entry["fn"])
    config = written(policies, entry)
    dummy = serve(policies.bf16("a"), config, load_format="dummy")
    fresh = serve(policies.bf16("b"), config)

    flashquant.reload_weights(dummy.llm, policies.tensors("b"))

    dummy.snapshot().assert_same(fresh.start)
    here, there = flashquant.status(dummy.llm), flashquant.status(fresh.llm)
    assert (here.in_bf16, here.overrides) == (there.in_bf16, there.overrides)


@pytest.mark.skipif(
    not torch.cpu._is_avx512_supported(), reason="vLLM caches in fp8 on AVX-512 or AMX only"
)
@pytest.mark.parametrize("scheme", ["int8", "bf16"])
def test_a_cache_in_fp8_begins_with_scales_of_one(policies: Policies, scheme: str) -> None:
    """vLLM fills all that it creates with random numbers, scales too; half of them negative."""
    config = written(policies, {"fn": scheme, "kv_cache": "fp8"})
    fresh = serve(policies.bf16("b"), config)
    dummy = serve(policies.bf16("a"), config, load_format="dummy")

    flashquant.reload_weights(dummy.llm, policies.tensors("b"))
    dummy.snapshot().assert_same(fresh.start)
