"""Which log-probs an engine is asked for."""

from __future__ import annotations

import logging
from types import SimpleNamespace
from typing import Any

import pytest
from vllm import SamplingParams
from vllm.v1.engine.core import EngineCore

from flashquant.errors import ConfigError
from flashquant.patches.decided import ADDITIONAL_CONFIG_KEY
from flashquant.patches.seams import engine_core
from flashquant.patches.seams.logprobs import configure_logprobs, truncation_to_warn_of


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


def model_of(**settings: Any) -> SimpleNamespace:
    usual = {"logprobs_mode": "processed_logprobs", "return_sampling_mask": False}
    return SimpleNamespace(**usual | settings, get_vocab_size=lambda: 100)


@pytest.mark.parametrize(
    ("sampling", "cut"),
    [
        ({"top_k": 50, "top_p": 0.9}, "top_k=50, top_p=0.9"),
        ({"min_p": 0.05}, "min_p=0.05"),
        ({}, None),
        ({"top_k": 100}, None),  # the whole vocabulary
        ({"top_k": 50, "logprobs": None}, None),  # nobody will make a ratio of it
        ({"top_k": 50, "top_p": 0.9, "temperature": 0}, None),  # greedy: vLLM drops them itself
    ],
    ids=str,
)
def test_sampling_that_cuts_tokens_off_is_known(sampling: dict[str, Any], cut: str | None):
    assert truncation_to_warn_of(SamplingParams(**{"logprobs": 0} | sampling), model_of()) == cut


@pytest.mark.parametrize(
    "settings", [{"return_sampling_mask": True}, {"logprobs_mode": "raw_logprobs"}], ids=str
)
def test_who_asked_for_the_mask_or_for_other_logprobs_is_left_alone(settings: dict[str, Any]):
    cut = SamplingParams(logprobs=0, top_p=0.5)

    assert truncation_to_warn_of(cut, model_of(**settings)) is None


def test_a_pooling_request_has_no_sampling():
    assert truncation_to_warn_of(None, model_of()) is None


@pytest.mark.parametrize(
    ("mask", "remedy"), [(True, "return_sampling_mask=True"), (False, "tis.Truncation")]
)
def test_it_is_said_once_with_what_this_vllm_has_against_it(
    caplog: pytest.LogCaptureFixture, mask: bool, remedy: str
):
    core: Any = object.__new__(EngineCore)
    core.vllm_config = SimpleNamespace(
        model_config=model_of(), additional_config={ADDITIONAL_CONFIG_KEY: {}}
    )
    if not mask:
        del core.vllm_config.model_config.return_sampling_mask
    taken: list[Any] = []

    with caplog.at_level(logging.WARNING, "flashquant"):
        for top_p in (1.0, 0.9, 0.8):
            request = SimpleNamespace(sampling_params=SamplingParams(logprobs=0, top_p=top_p))
            engine_core._add_request(lambda core, given, wave: taken.append(given), core, request)

    assert len(taken) == 3
    (said,) = caplog.messages
    assert "top_p=0.9" in said
    assert remedy in said
