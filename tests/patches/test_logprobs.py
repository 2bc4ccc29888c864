"""Which log-probs an engine is asked for."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest

from flashquant.errors import ConfigError
from flashquant.patches.seams.logprobs import configure_logprobs


def configured(environ: dict[str, str], **args: Any) -> SimpleNamespace:
    made = SimpleNamespace(**{"logprobs_mode": "raw_logprobs", "hf_overrides": None, **args})
    configure_logprobs(made, environ)
    return made


def test_log_probs_are_those_of_what_was_sampled():
    assert configured({}).logprobs_mode == "processed_logprobs"
    assert configured({}).hf_overrides is None


@pytest.mark.parametrize("mode", ["raw_logits", "processed_logits", "processed_logprobs"])
def test_another_mode_is_somebodys_wish(mode: str):
    assert configured({}, logprobs_mode=mode).logprobs_mode == mode


def test_vllms_own_can_be_kept():
    kept = configured({"FLASHQUANT_SAMPLED_LOGPROBS": "0"})

    assert kept.logprobs_mode == "raw_logprobs"


def test_the_head_is_float32_where_it_is_asked_for():
    wanted = configured({"FLASHRL_LMHEAD_FP32": "1"}, hf_overrides={"rope_theta": 1e6})

    assert wanted.hf_overrides == {"rope_theta": 1e6, "head_dtype": "float32"}
    assert configured({"FLASHRL_LMHEAD_FP32": "0"}).hf_overrides is None


def test_a_head_that_was_chosen_stays():
    chosen = configured({"FLASHRL_LMHEAD_FP32": "1"}, hf_overrides={"head_dtype": "model"})

    assert chosen.hf_overrides == {"head_dtype": "model"}


def test_overrides_by_a_function_are_refused():
    with pytest.raises(ConfigError, match="let the function set head_dtype"):
        configured({"FLASHRL_LMHEAD_FP32": "1"}, hf_overrides=lambda config: config)


@pytest.mark.parametrize("name", ["FLASHQUANT_SAMPLED_LOGPROBS", "FLASHRL_LMHEAD_FP32"])
def test_what_is_neither_yes_nor_no_is_refused(name: str):
    with pytest.raises(
        ConfigError, match=f"{name}='maybe' is neither yes nor no; set it to 1 or 0"
    ):
        configured({name: "maybe"})
