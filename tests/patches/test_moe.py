"""Which linear layers are routers, and which the CPU's kernel for fp8 blocks cannot hold."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest
from torch import nn

from flashquant.patches.decided import ADDITIONAL_CONFIG_KEY, STARTS_ON_FLOATS
from flashquant.patches.layers import cpu
from flashquant.patches.seams import moe


def asked(monkeypatch: pytest.MonkeyPatch, rows: int, *, experts: int = 16, **decided: Any) -> bool:
    """Whether an unsharded layer is created without a quantization."""
    config = SimpleNamespace(
        additional_config={ADDITIONAL_CONFIG_KEY: decided} if decided else {},
        model_config=SimpleNamespace(get_num_experts=lambda: experts),
    )
    monkeypatch.setattr(moe, "get_current_vllm_config_or_none", lambda: config)
    seen: list[Any] = []

    def init(_layer: Any, *args: Any, **_kwargs: Any) -> None:
        seen.append(args[5])

    moe._init_replicated(init, nn.Module(), 64, rows, quant_config="theirs", prefix="mlp.gate")
    return seen == [None]


@pytest.mark.parametrize("rows", [16, 1])
def test_a_row_an_expert_is_a_router_and_one_for_the_shared_expert(
    monkeypatch: pytest.MonkeyPatch, rows: int
) -> None:
    assert asked(monkeypatch, rows, **{STARTS_ON_FLOATS: True})


def test_other_unsharded_layers_are_quantized(monkeypatch: pytest.MonkeyPatch) -> None:
    assert not asked(monkeypatch, 576, **{STARTS_ON_FLOATS: True})


def test_a_model_without_experts_has_no_routers(monkeypatch: pytest.MonkeyPatch) -> None:
    assert not asked(monkeypatch, 1, experts=0, **{STARTS_ON_FLOATS: True})


def test_a_checkpoint_of_codes_says_itself_what_it_holds(monkeypatch: pytest.MonkeyPatch) -> None:
    assert not asked(monkeypatch, 16, **{STARTS_ON_FLOATS: False})


def test_an_engine_that_flashquant_did_not_configure_is_left_alone(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    assert not asked(monkeypatch, 16)


@pytest.mark.parametrize("rows", [16, 48, 100])
def test_rows_that_would_end_the_process_are_refused(rows: int) -> None:
    layer = nn.Linear(8, rows)

    with pytest.raises(ValueError, match=rf"{rows} rows"):
        cpu._refuse_left_over_rows(None, None, layer)


def test_whole_tiles_of_rows_go_on_to_vllm() -> None:
    seen: list[Any] = []

    cpu._refuse_left_over_rows(lambda *args: seen.append(args), "kernel", nn.Linear(8, 96))

    assert len(seen) == 1
