"""Who needs a configuration for each entry, and who is refused one."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from vllm.engine.arg_utils import EngineArgs

from flashquant.errors import ConfigError
from flashquant.patches.remote.replicas import _create_engine_config


@pytest.fixture(autouse=True)
def two_entries(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    file = tmp_path / "two.yaml"
    file.write_text("configs: [{fn: int8}, {fn: bf16}]")
    monkeypatch.setenv("FLASHRL_CONFIG", str(file))


def created(args: EngineArgs, *, is_moe: bool = False) -> tuple[list[Any], Any]:
    """The arguments for which vLLM was asked to make a configuration, and the last one."""
    asked = []

    def create(args: EngineArgs) -> Any:
        asked.append(args)
        return SimpleNamespace(model_config=SimpleNamespace(is_moe=is_moe))

    return asked, _create_engine_config(create, args)


def test_each_entry_gets_a_configuration_of_its_own(tmp_path: Path) -> None:
    asked, config = created(EngineArgs(str(tmp_path), data_parallel_size=2))
    entries = [getattr(args, "flashquant_entry", None) for args in asked]

    assert [entry and entry.scheme for entry in entries] == [None, "int8", "bf16"]
    assert len(config.flashquant_replicas) == 2


@pytest.mark.parametrize("alone", [{}, {"data_parallel_size": 2, "data_parallel_rank": 1}])
def test_an_engine_with_a_front_end_of_its_own_is_left_alone(
    alone: dict[str, Any], tmp_path: Path
) -> None:
    asked, _ = created(EngineArgs(str(tmp_path), **alone))

    assert len(asked) == 1


def test_ranks_that_compute_together_need_one_scheme(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"two\.yaml has 2 entries.*mixture of experts"):
        created(EngineArgs(str(tmp_path), data_parallel_size=2), is_moe=True)
