"""Routing replay with what a real engine returns: log-probs are as near as a dense model's.

Both sides in bf16, each with kernels of its own: vLLM's and transformers'. Seen here, mean and most
of |trainer's - rollout's log-prob|: 0.0099 and 0.145 without, 0.0061 and 0.028 with replay, 0.0090
and 0.031 of a dense model.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from transformers import AutoModelForCausalLM

from flashquant.tis import replay_routing
from tests.engine.processes import run
from tests.engine.serving import needs
from tools.architectures import write

pytestmark = pytest.mark.engine


class Trainer:
    """A model in bf16, and how far its log-probs are from those of some answers."""

    def __init__(self, folder: Path, answers: list[dict[str, Any]]) -> None:
        self.model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.bfloat16).eval()
        self.answers = answers
        self.rollout = torch.tensor([answer["logprobs"] for answer in answers])

    def gap(self, replay: bool = False) -> Tensor:
        """`[answers, tokens]`: |log p of the trainer - log p of the rollout|."""
        ids = torch.tensor([answer["prompt"] + answer["tokens"] for answer in self.answers])
        tokens = torch.tensor([answer["tokens"] for answer in self.answers])
        with torch.no_grad():
            if replay:
                routed = [torch.tensor(answer["routed"]) for answer in self.answers]
                with replay_routing(self.model, routed):
                    logits = self.model(ids).logits
            else:
                logits = self.model(ids).logits
        predicting = logits[:, -tokens.shape[1] - 1 : -1].float().log_softmax(-1)
        found = predicting.gather(-1, tokens.unsqueeze(-1)).squeeze(-1)
        return (found - self.rollout).abs()


@needs(">=0.31", "second runner that returns experts on a CPU")
def test_with_replay_a_mixture_of_experts_is_as_near_as_a_dense_model(tmp_path: Path) -> None:
    pytest.importorskip("triton")
    folders = {kind: tmp_path / kind for kind in ("qwen3-moe", "qwen3")}
    for kind, folder in folders.items():
        write(kind, 0, folder)
    said = run(
        "routed",
        *folders.values(),
        FLASHRL_CONFIG="bf16",
        VLLM_USE_V2_MODEL_RUNNER="1",
        TRITON_INTERPRET="1",
    )

    moe, dense = (
        Trainer(folder, said[name])
        for name, folder in zip(("moe", "dense"), folders.values(), strict=True)
    )
    alone, replayed, of_dense = moe.gap(), moe.gap(replay=True), dense.gap()
    shown = {
        name: f"mean {gap.mean():.4f}, most {gap.max():.4f}"
        for name, gap in (("without", alone), ("with", replayed), ("dense", of_dense))
    }
    assert replayed.mean() <= of_dense.mean(), shown
    assert replayed.max() <= 1.5 * of_dense.max(), shown
    assert alone.mean() > 1.2 * replayed.mean(), shown
    assert alone.max() > 2 * replayed.max(), shown
