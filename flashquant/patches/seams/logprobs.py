"""Log-probs as a loss needs them: of the distribution that each token was sampled from.

By default vLLM returns what the model says before temperature, penalties, top-k and top-p have
had their say. A ratio of policies is wrong by all of them then, and no correction can know. vLLM
can do either (`logprobs_mode`), and its head in float32, too (`head_dtype`): a trainer's logits
are float32, and in bf16 the head alone costs a log-prob its third digit.

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
