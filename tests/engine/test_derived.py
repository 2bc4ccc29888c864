"""What an engine has made of old weights is not used under the new ones; or it is warned of."""

from __future__ import annotations

import logging
import os
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any
from unittest import mock

import pytest

import flashquant
from flashquant.patches.seams import derived
from tests.engine import processes, sounds
from tests.engine.programs import heard
from tests.engine.programs.keeping import connected
from tests.engine.serving import serve
from tools.models.policies import Policies

pytestmark = pytest.mark.engine


@pytest.fixture(scope="module")
def ears(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """Two policies that differ only in the encoder of what they hear."""
    folder = tmp_path_factory.mktemp("ears")
    return {
        name: sounds.make(folder / name, policy=0, tower=seed) for seed, name in enumerate("ab")
    }


@pytest.fixture(scope="module")
def fresh(ears: dict[str, Path]) -> Any:
    """An engine that started on policy B."""
    return hearing(ears["b"])


_KEPT: list[Any] = []  # vLLM's parallel state goes with the first engine that is collected


def hearing(checkpoint: Path) -> Any:
    from vllm import LLM

    flashquant.patch()
    with mock.patch.dict(os.environ, FLASHRL_CONFIG="bf16"):
        _KEPT.append(LLM(str(checkpoint), **sounds.OPTIONS))
    return _KEPT[-1]


@pytest.mark.parametrize("where", ["in this process", "in another process"])
@pytest.mark.parametrize("how", ["flashquant", "rpc"])
def test_what_was_heard_by_the_old_encoder_is_heard_again(
    ears: dict[str, Path], fresh: Any, how: str, where: str
) -> None:
    """The same sound, by a request in flight and by later ones; and the engine lives.

    From where the update came, the one in flight goes on as if the fresh engine had been asked to
    go on from there. From elsewhere it may not: a kernel (AMX's) rounds by how many tokens it is
    handed at once.
    """
    if where == "in this process":
        answer = heard.converse(hearing(ears["a"]), ears["b"], how)
    else:
        answer = processes.run(
            "heard",
            ears["a"],
            ears["b"],
            how,
            FLASHRL_CONFIG="bf16",
            VLLM_ENABLE_V1_MULTIPROCESSING="1",
        )

    assert answer["after"] == answer["again"] == heard.said(fresh) != answer["before"]
    said = answer["in flight"]
    assert any(
        said[cut : cut + 8] == heard.said(fresh, said[:cut])
        and said[cut:] == heard.said(fresh, said[:cut], len(said) - cut)
        for cut in range(heard.CUT, heard.IN_FLIGHT - 8)
    )


def test_a_worker_that_forgets_by_itself_does_not_end_the_engine(ears: dict[str, Path]) -> None:
    """vLLM resets one half of its encoder cache wherever only the worker is asked to."""
    llm = hearing(ears["a"])
    before = heard.said(llm)

    llm.collective_rpc("reset_encoder_cache")

    assert heard.said(llm) == before


@pytest.fixture
def connectors() -> Iterator[None]:
    """vLLM has one KV connector a process, which every later engine would take for its own."""
    from vllm.distributed.kv_transfer import ensure_kv_transfer_shutdown

    yield
    ensure_kv_transfer_shutdown()


@pytest.mark.usefixtures("connectors")
@pytest.mark.parametrize("where", ["in this process", "in another process"])
def test_a_connector_that_cannot_drop_old_keys_is_warned_of_as_the_engine_starts(
    where: str, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    """vLLM takes its silence for a yes; one that can is told to, and there is no warning."""
    checkpoint, log = Policies(tmp_path, "qwen2").bf16("a"), tmp_path / "log"
    if where == "in this process":
        with caplog.at_level(logging.WARNING, "flashquant"):
            serve(checkpoint, "bf16", kv_transfer_config=connected(str(tmp_path / "keys")))
        said = caplog.text
    else:
        processes.run(
            "keeping",
            checkpoint,
            tmp_path / "keys",
            FLASHRL_CONFIG="bf16",
            FLASHRL_LOGGING_FILE=str(log),
            VLLM_ENABLE_V1_MULTIPROCESSING="1",
        )
        said = log.read_text()

    assert said.count("ExampleConnector cannot be told to drop") == 1
    assert "Empty its storage after each update" in said


def test_a_connector_that_can_is_told_to_drop_old_keys() -> None:
    """With the prefix cache, in one call of vLLM's."""
    core = mock.Mock()
    core.scheduler.requests, core.batch_queue = {}, None
    core.vllm_config.model_config = SimpleNamespace(
        is_multimodal_model=False, runner_type="generate"
    )

    derived.drop(core)

    core.reset_prefix_cache.assert_called_once_with(
        reset_running_requests=True, reset_connector=True
    )
    core.model_executor.collective_rpc.assert_not_called()


def test_scales_of_the_first_batch_are_warned_of(caplog: pytest.LogCaptureFixture) -> None:
    """vLLM up to 0.27 keeps those that it made of the old weights."""
    core = mock.Mock()
    core.scheduler.get_kv_connector.return_value = core.scheduler.ec_connector = None

    for asked in (False, True):
        core.vllm_config.cache_config = SimpleNamespace(calculate_kv_scales=asked)
        derived.warn(core)

    (warning,) = caplog.messages
    assert "still those of the old weights" in warning
