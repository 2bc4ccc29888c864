"""How close to bf16 is a KV cache in fp8, by where its scales come from? On the real engine.

    python -m benchmarks.kv_cache [--tokens 2048] [--steps 20] [--rate 1e-4]

SmolLM2-135M, weights in bf16, so that the cache alone makes a difference. Scales are made of one
part of a text, and KL is measured on another: of the policy as it was, and after real fine-tuning.
How much nearer scales are than 1.0 has a standard error of its own, over pieces of 64 tokens: it is
taken of the difference token by token, for the arms err together.
"""

from __future__ import annotations

import argparse
import json
import os
import sys
import tempfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from transformers import AutoTokenizer, LlamaForCausalLM

import flashquant
from benchmarks import arms
from benchmarks.fidelity import LENGTH, Weights, fine_tuned, start, token_by_token
from examples.demo import smollm2
from flashquant.profiles import save_kv_scales
from flashquant.profiles.making import Checkpoint

_PIECE = 64  # tokens
_ONES, _KEPT, _REFRESHED = "scales of 1.0", "calibrated, kept", "refreshed with the policy"


def main() -> int:
    """Print one table a policy."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--tokens", type=int, default=2048)
    parser.add_argument("--steps", type=int, default=20, help="of real fine-tuning")
    parser.add_argument("--rate", type=float, default=1e-4, help="its learning rate")
    chosen = parser.parse_args()
    os.environ.update(arms.environment() | {"OMP_NUM_THREADS": str(os.cpu_count())})
    arms.enable_amx()
    path = smollm2.checkpoint(smollm2.default_cache_dir())
    prose = Path(smollm2.__file__).with_name("prose.txt").read_text(encoding="utf-8")
    tokens = AutoTokenizer.from_pretrained(path)(prose).input_ids
    asked, known = tokens[-chosen.tokens :], tokens[: -chosen.tokens]
    begin = dict(Checkpoint(path))
    calibrated = scales_of(path, begin, known)
    with tempfile.TemporaryDirectory() as folder:
        save_kv_scales(calibrated, Path(folder) / "kv.json", str(path))
        entry = {"fn": "bf16", "kv_cache": "fp8"}
        configs = {
            _ONES: entry,
            **{arm: {**entry, "kv_scales": "kv.json"} for arm in (_KEPT, _REFRESHED)},
        }
        engines = {"bf16": start(path, "bf16")}
        for number, (arm, config) in enumerate(configs.items()):
            file = Path(folder) / f"{number}.yaml"
            file.write_text(json.dumps({"configs": [config]}))
            engines[arm] = start(path, str(file))
        pushed(engines, begin)
        say("as calibrated", token_by_token(engines, asked))
        tuned = fine_tuned(path, known, chosen.steps, chosen.rate)
        refreshed = scales_of(path, tuned, known)
        moved = sum(refreshed[name] != calibrated[name] for name in refreshed)
        pushed(engines, tuned)
        flashquant.reload_weights(engines[_REFRESHED], tuned, kv_scales=refreshed)
        say(
            f"after {chosen.steps} steps at {chosen.rate:g}; {moved} of {len(refreshed)} layers "
            "have other scales",
            token_by_token(engines, asked),
        )
    return 0


def pushed(engines: Mapping[str, Any], weights: Weights) -> None:
    """The same policy into all engines."""
    for llm in engines.values():
        flashquant.reload_weights(llm, weights)


def say(policy: str, found: Mapping[str, Tensor]) -> None:
    """The table of one policy, in markdown."""
    kl = {arm: each[1] for arm, each in found.items() if arm != "bf16"}
    rows = [
        (arm, f"{each.mean():.5f}", beside(each - kl[_ONES]) if arm != _ONES else "")
        for arm, each in kl.items()
    ]
    titles = (policy, "KL per token", f"beside {_ONES}")
    sys.stdout.write(arms.table(titles, rows) + "\n\n")
    sys.stdout.flush()


def beside(difference: Tensor) -> str:
    """A mean, and its standard error over pieces of the text."""
    pieces = difference[: len(difference) // _PIECE * _PIECE].view(-1, _PIECE).mean(1)
    return f"{difference.mean():+.5f} ± {pieces.std() / len(pieces) ** 0.5:.5f}"


def scales_of(path: Path, weights: Weights, known: list[int]) -> dict[str, tuple[float, float]]:
    """What a trainer would send with this policy."""
    model = LlamaForCausalLM.from_pretrained(path, dtype=torch.bfloat16)
    model.load_state_dict(weights, strict=False)  # its head is its embeddings
    return flashquant.kv_scales(
        model, [known[i : i + LENGTH] for i in range(0, len(known), LENGTH)]
    )


if __name__ == "__main__":
    raise SystemExit(main())
