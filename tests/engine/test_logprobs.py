"""What an engine returns is the log-prob of the distribution that was sampled from.

The reference is transformers on the same weights, and the definitions of temperature, top-k and
top-p written out here; vLLM's own code is not asked.
"""

from __future__ import annotations

import logging
import os
from pathlib import Path
from typing import Any
from unittest import mock

import pytest
import torch
from torch import Tensor
from transformers import AutoModelForCausalLM

import flashquant
from flashquant import tis
from flashquant.patches.seams import engine_core
from tests.engine.serving import Serving
from tools.models import tiny_models

pytestmark = pytest.mark.engine

PROMPT = list(range(5, 45))
SAMPLING = [
    {"temperature": 1.0},
    {"temperature": 0.6},
    {"temperature": 1.4, "top_k": 20},
    {"temperature": 0.8, "top_p": 0.7},
    {"temperature": 1.2, "top_k": 50, "top_p": 0.6},
]


class Served:
    """An engine with a bf16 head and one with a float32 head, and a model in float32."""

    def __init__(self, folder: Path) -> None:
        start, self.policy = (
            tiny_models.make("qwen2", seed, folder / str(seed), tied=True) for seed in (0, 1)
        )
        self.reference = AutoModelForCausalLM.from_pretrained(
            self.policy, dtype=torch.float32
        ).eval()
        self.engines = {}
        for head in ("0", "1"):
            with mock.patch.dict(os.environ, FLASHRL_LMHEAD_FP32=head):
                self.engines[head] = Serving(start, "bf16")
                flashquant.reload_weights(self.engines[head].llm, self.policy)

    def sampled(self, head: str, **sampling: Any) -> tuple[list[int], Tensor]:
        """32 tokens, and what the engine says of each."""
        from vllm import SamplingParams

        wanted = SamplingParams(max_tokens=32, ignore_eos=True, logprobs=0, seed=7, **sampling)
        prompt = {"prompt_token_ids": PROMPT}
        (answer,) = self.engines[head].llm.generate([prompt], wanted, use_tqdm=False)
        output = answer.outputs[0]
        steps = zip(output.token_ids, output.logprobs, strict=True)
        said = [step[token].logprob for token, step in steps]
        return list(output.token_ids), torch.tensor(said)

    def expected(self, tokens: list[int], **sampling: Any) -> Tensor:
        """The log-prob of each token under the distribution it should come from."""
        with torch.no_grad():
            logits = self.reference(input_ids=torch.tensor([PROMPT + tokens])).logits[0]
        log = shaped(logits[len(PROMPT) - 1 : -1].double(), **sampling)
        return log.gather(1, torch.tensor(tokens).unsqueeze(1)).squeeze(1).float()


def shaped(
    logits: Tensor, temperature: float, top_k: int | None = None, top_p: float = 1.0
) -> Tensor:
    """Temperature, then the k best, then the fewest of these that hold p; log-probs."""
    logits = logits / temperature
    if top_k is not None:
        kth = logits.sort(dim=-1, descending=True).values[:, top_k - 1 : top_k]
        logits = logits.masked_fill(logits < kth, -torch.inf)
    ranked, order = logits.softmax(-1).sort(dim=-1, descending=True)
    before = ranked.cumsum(-1) - ranked
    dropped = torch.zeros_like(logits, dtype=torch.bool).scatter(1, order, before >= top_p)
    return logits.masked_fill(dropped, -torch.inf).log_softmax(-1)


@pytest.fixture(scope="module")
def served(tmp_path_factory: pytest.TempPathFactory) -> Served:
    return Served(tmp_path_factory.mktemp("logprobs"))


@pytest.mark.parametrize(
    "sampling", SAMPLING, ids=lambda s: ", ".join(f"{k} {v}" for k, v in s.items())
)
def test_log_probs_are_of_the_distribution_that_was_sampled_from(
    served: Served, sampling: dict[str, Any]
) -> None:
    tokens, said = served.sampled("1", **sampling)

    off = (said - served.expected(tokens, **sampling)).abs()

    # bf16 activations against float32, so that top-k and top-p may cut a token sooner or later.
    assert off.median() < 0.02
    assert off.isfinite().sum() >= 30
    assert off.quantile(0.9) < 0.1
    plain = served.expected(tokens, temperature=1.0)
    if sampling != {"temperature": 1.0}:
        assert (said - plain).abs().median() > 5 * off.median()


def test_sampling_that_cuts_tokens_off_is_warned_of_once(
    served: Served, caplog: pytest.LogCaptureFixture
) -> None:
    core = served.engines["1"].llm.llm_engine.engine_core.engine_core
    engine_core._noted(core).warned = False

    with caplog.at_level(logging.WARNING, "flashquant"):
        served.sampled("1", temperature=0.6)
        assert caplog.messages == []
        for top_p in (0.7, 0.8):
            served.sampled("1", temperature=1.0, top_p=top_p)

    (said,) = caplog.messages
    assert "top_p=0.7" in said


def test_a_renormalized_trainer_is_as_near_as_a_rollout_without_a_cut(served: Served) -> None:
    """`masked_logprobs` of the reference, at SmolLM2's size in benchmarks/sampling_mask.py."""
    sampling = {"temperature": 1.2, "top_k": 50, "top_p": 0.6}
    tokens, said = served.sampled("1", **sampling)
    with torch.no_grad():
        logits = served.reference(input_ids=torch.tensor([PROMPT + tokens])).logits
    predicting = logits[:, len(PROMPT) - 1 : -1]

    found, whole = (
        tis.masked_logprobs(predicting, torch.tensor([tokens]), cut, temperature=1.2)[0]
        for cut in (tis.Truncation(top_k=50, top_p=0.6), tis.Truncation())
    )

    assert (said - found).abs().median() < 0.02
    assert (said - whole).median() > 0.2


def test_a_float32_head_is_nearer_to_the_trainer(served: Served) -> None:
    gaps = []
    for head in ("0", "1"):
        tokens, said = served.sampled(head, temperature=1.0)
        gaps.append((said - served.expected(tokens, temperature=1.0)).abs().mean())

    assert gaps[1] < gaps[0]


def test_a_float32_head_is_reloaded_like_any(served: Served) -> None:
    with mock.patch.dict(os.environ, FLASHRL_LMHEAD_FP32="1"):
        fresh = Serving(served.policy, "bf16")

        fresh.start.assert_same(served.engines["1"].snapshot())
