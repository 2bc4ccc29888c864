"""Vision-language models: a push equals a fresh start, images included; towers stay in bf16."""

from __future__ import annotations

import logging
import os
from functools import cache
from pathlib import Path
from typing import Any
from unittest import mock

import pytest
import torch

import flashquant
from flashquant.patches.seams.loading import session_of
from tests.engine import processes, sights
from tests.engine.programs import seen
from tests.engine.serving import FP8_CHANNEL

pytestmark = pytest.mark.engine

SCHEMES = ["bf16", "int8", pytest.param("fp8_channel", marks=FP8_CHANNEL)]
_KEPT: list[Any] = []  # vLLM's parallel state goes with the first engine that is collected


@pytest.fixture(scope="module", params=sights.SIGHTS)
def policies(
    request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory
) -> dict[str, Path]:
    """B differs from A everywhere."""
    if why := sights.missing():
        pytest.skip(why)
    folder = tmp_path_factory.mktemp(request.param)
    return {
        which: sights.make(request.param, folder / which, seed) for seed, which in enumerate("ab")
    }


def started(checkpoint: Path, config: str, *, caching: bool = False) -> Any:
    from vllm import LLM

    flashquant.patch()
    with mock.patch.dict(os.environ, FLASHRL_CONFIG=config), sights.understood():
        llm = LLM(str(checkpoint), **sights.options(enable_prefix_caching=caching))
    _KEPT.append(llm)
    return llm


@cache
def fresh(checkpoint: Path, scheme: str, caching: bool) -> Any:
    """What an engine says that started there."""
    return seen.stands(started(checkpoint, scheme, caching=caching))


def expected(policies: dict[str, Path], scheme: str, caching: bool) -> list[Any]:
    a, b = (fresh(policies[which], scheme, caching) for which in "ab")
    assert a[0] != b[0]
    assert a[2] != b[2]
    assert a[2] != a[1]  # the image matters
    return [a, b, a, b, a]


@pytest.mark.parametrize("scheme", SCHEMES)
@pytest.mark.parametrize("caching", [False, True], ids=["no prefix cache", "prefix cache"])
def test_an_engine_in_this_process_sees_as_a_fresh_one(
    policies: dict[str, Path], scheme: str, caching: bool
) -> None:
    """By path, by a trainer's names, a tensor a call; after words, and the same image again."""
    llm = started(policies["a"], scheme, caching=caching)

    told = seen.converse(llm, policies["a"], policies["b"])

    assert told == expected(policies, scheme, caching)


@pytest.mark.parametrize("scheme", SCHEMES)
def test_an_engine_in_another_process_sees_as_a_fresh_one(
    policies: dict[str, Path], scheme: str
) -> None:
    told = processes.run(
        "seen",
        policies["a"],
        policies["b"],
        FLASHRL_CONFIG=scheme,
        VLLM_ENABLE_V1_MULTIPROCESSING="1",
        VLLM_ALLOW_INSECURE_SERIALIZATION="1",
    )

    for caching in (False, True):
        assert told[str(caching)] == expected(policies, scheme, caching)


def linears(llm: Any) -> dict[str, torch.dtype]:
    """The dtype in which each linear layer's weight is stored, by its name in the model."""
    model = llm.apply_model(lambda model: model)[0]
    stored = session_of(model)._engine.stored
    return {k: tensor.dtype for k, tensor in stored.items() if tensor.dim() == 2}


@pytest.mark.parametrize("scheme", SCHEMES[1:])
def test_a_tower_stays_in_bf16_and_the_log_says_so(
    policies: dict[str, Path], scheme: str, caplog: pytest.LogCaptureFixture
) -> None:
    """All of it, and nothing else; for it is marked by vLLM, whatever it is called."""
    with caplog.at_level(logging.INFO, "flashquant"):
        found = linears(started(policies["a"], scheme))

    assert {dtype for k, dtype in found.items() if k.startswith("visual.")} == {torch.bfloat16}
    rest = {dtype for k, dtype in found.items() if k.startswith("language_model.model.layers")}
    assert torch.bfloat16 not in rest
    (line,) = [r.message for r in caplog.records if r.name.endswith("towers")]
    assert "stay in bf16: visual (" in line
    assert "quantize_towers: true" in line


def test_a_tower_is_quantized_where_that_is_asked(
    policies: dict[str, Path], tmp_path: Path
) -> None:
    """Then, too, a push equals a fresh start."""
    config = tmp_path / "towers.yaml"
    config.write_text("configs:\n  - {fn: int8, quantize_towers: true}\n")
    llm = started(policies["a"], str(config))
    assert torch.int8 in {d for k, d in linears(llm).items() if k.startswith("visual.")}

    told = seen.converse(llm, policies["a"], policies["b"])

    assert told == expected(policies, str(config), caching=False)
