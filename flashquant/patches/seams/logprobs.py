"""Log-probs as a loss needs them: of the distribution that each token was sampled from.

By default vLLM returns what the model says before temperature, penalties, top-k and top-p have
had their say. A ratio of policies is wrong by all of them then, and no correction can know. vLLM
can do either (`logprobs_mode`), and its head in float32, too (`head_dtype`): a trainer's logits
are float32, and in bf16 the head alone costs a log-prob its third digit.

So they are normalized over the tokens that top-k, top-p and min-p have left, which a trainer's are
not: it is warned, once an engine.

    FLASHQUANT_SAMPLED_LOGPROBS=0   leave `logprobs_mode` as it is
    FLASHRL_LMHEAD_FP32=1           compute logits in float32
"""

from __future__ import annotations

import logging
from collections.abc import Mapping
from typing import Any

from flashquant.config import env
from flashquant.errors import ConfigError

logger = logging.getLogger(__name__)


def configure_logprobs(args: Any, environ: Mapping[str, str]) -> None:
    """Ask vLLM for the log-probs of what was sampled, and for a float32 head if wanted.

    A mode of logits was asked for explicitly and stays; so does a `head_dtype`.

    Args:
        args: vLLM's `EngineArgs`, changed in place.
        environ: of the process that creates the engine.

    Raises:
        ConfigError: a variable is neither yes nor no, or hf_overrides is a function.

    """
    if env.SAMPLED_LOGPROBS.read(environ) and args.logprobs_mode == "raw_logprobs":
        args.logprobs_mode = "processed_logprobs"
        logger.info(
            "log-probs are those of the distribution that was sampled from "
            "(logprobs_mode='processed_logprobs'); %s=0 leaves vLLM's own, of the model alone",
            env.SAMPLED_LOGPROBS.name,
        )
    if env.LMHEAD_FP32.read(environ):
        if callable(args.hf_overrides):
            raise ConfigError(
                f"{env.LMHEAD_FP32.name}=1 adds head_dtype to hf_overrides, which was given as a "
                "function. Pass hf_overrides as a dict, or let the function set "
                "head_dtype='float32'."
            )
        args.hf_overrides = {"head_dtype": "float32", **(args.hf_overrides or {})}


def truncation_to_warn_of(params: Any, model_config: Any) -> str | None:
    """What a request's sampling cuts off, where its log-probs are over the rest and nobody knows.

    Args:
        params: vLLM's `SamplingParams`, as the engine core has them; None for a pooling request.
        model_config: vLLM's `ModelConfig`.

    Returns:
        The settings that cut, as one would write them; None if nothing is to be said.

    """
    if params is None or params.logprobs is None:
        return None
    over_the_rest = model_config.logprobs_mode == "processed_logprobs"
    if not over_the_rest or getattr(model_config, "return_sampling_mask", False):
        return None
    cuts = {
        "top_k": 0 < params.top_k < model_config.get_vocab_size(),
        "top_p": params.top_p < 1,
        "min_p": params.min_p > 0,
    }
    found = [f"{name}={getattr(params, name):g}" for name, cuts_off in cuts.items() if cuts_off]
    return ", ".join(found) or None


def warn_of_truncation(cut: str, model_config: Any) -> None:
    """Say what it does to a ratio of policies, and what this vLLM has against it."""
    mask = (
        "start the engine with return_sampling_mask=True (vLLM's second model runner, top_k above "
        "0), and give outputs' sampling_mask to it"
        if hasattr(model_config, "return_sampling_mask")
        else "give it a tis.Truncation, since this vLLM does not say which tokens it kept"
    )
    logger.warning(
        "a request is sampled with %s, so its log-probs are over the tokens that are left. A "
        "trainer's over the whole vocabulary are lower at every token, which no correction of the "
        "loss can mend. Sample without, or compute the trainer's with "
        "flashquant.tis.masked_logprobs: %s (docs/loss-correction.md). This is said once an engine",
        cut,
        mask,
    )
