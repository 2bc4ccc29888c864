"""What dominates is named, in cases made on purpose: tokens are really sampled by the rollout."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from flashquant.errors import CorrectionError
from flashquant.tis import report

VOCABULARY, LENGTH, ROWS = 200, 60, 24


def made(
    *,
    noise: float = 0.0,
    jumps: float = 0.0,
    top_k: int | None = None,
    lags: tuple[int, ...] = (),
    growth: float = 0.0,
    seed: int = 0,
) -> list[dict[str, Any]]:
    """Two steps of rollouts.

    Args:
        noise: of every logit, between the two.
        jumps: the part of positions at which the rollout's logits are largely others.
        top_k: of the rollout's sampler.
        lags: in turn, of the sequences; `growth` times it is noise of every logit, too.
        growth: see above.
        seed: of it all.

    """
    dice = torch.Generator().manual_seed(seed)

    def normal() -> Tensor:
        return torch.randn(LENGTH, VOCABULARY, generator=dice, dtype=torch.float64)

    records = []
    for row in range(ROWS):
        trainer = 2 * normal()
        lag = lags[row % len(lags)] if lags else None
        jump = torch.rand(LENGTH, 1, generator=dice) < jumps
        rollout = trainer + math.hypot(noise, growth * (lag or 0)) * normal()
        rollout = torch.where(jump, rollout + 2 * normal(), rollout)
        if top_k is not None:
            floor = rollout.topk(top_k).values[:, -1:]
            rollout = rollout.masked_fill(rollout < floor, -math.inf)
        theirs, ours = rollout.log_softmax(-1), trainer.log_softmax(-1)
        tokens = theirs.exp().multinomial(1, generator=dice)
        records.append(
            {
                "step": row // (ROWS // 2),
                "trainer": ours.gather(-1, tokens).squeeze(-1).tolist(),
                "rollout": theirs.gather(-1, tokens).squeeze(-1).tolist(),
                "entropy": (-(ours.exp() * ours).sum(-1)).tolist(),
            }
            | ({} if lag is None else {"lag": lag})
        )
    return records


CASES: dict[str, tuple[str, dict[str, Any]]] = {
    "the same policy": ("nothing", {}),
    "two bf16 engines": ("nothing", {"noise": 0.01}),
    "rounding of every logit": ("quantization", {"noise": 0.1}),
    "coarse rounding": ("quantization", {"noise": 0.5}),
    "rounding, all of one lag": ("quantization", {"noise": 0.1, "lags": (1,)}),
    "rounding, whatever the lag": ("quantization", {"noise": 0.1, "lags": (0, 1, 2)}),
    "other experts now and then": ("routing", {"noise": 0.02, "jumps": 0.01}),
    "other experts, and rounding": ("routing", {"noise": 0.06, "jumps": 0.01}),
    "top-k": ("sampling truncation", {"top_k": 20}),
    "top-k, and rounding": ("sampling truncation", {"top_k": 20, "noise": 0.1}),
    "top-k, and other experts": ("sampling truncation", {"top_k": 20, "jumps": 0.003}),
    "old weights": ("stale weights", {"noise": 0.05, "lags": (0, 1, 2, 3), "growth": 0.1}),
    "weights of which none is new": ("stale weights", {"lags": (1, 4), "growth": 0.1}),
}


@pytest.mark.parametrize("seed", range(3))
@pytest.mark.parametrize("case", CASES)
def test_what_was_done_is_what_is_named(case: str, seed: int) -> None:
    cause, how = CASES[case]

    found = report(made(**how, seed=seed))

    assert found.cause == cause, found
    assert found.tokens == ROWS * LENGTH
    assert ("Stale weights look the same" in found.sentence) == (
        cause == "quantization" and how.get("lags", (1,)) == (1,)
    )


def test_the_numbers_are_their_definitions() -> None:
    ratios = [1.0, 2.0, 0.5, 0.25]
    found = report([{"trainer": [math.log(r / 8) for r in ratios], "rollout": [-math.log(8)] * 4}])

    assert found.k1 == pytest.approx(math.log(4) / 4)
    assert found.k3 == pytest.approx(math.log(4) / 4 - 1 / 16)
    assert found.cut == pytest.approx(1 - 3.75 / 4)
    assert found.cut_error == pytest.approx(torch.tensor(ratios).double().std().item() / 2)
    assert found.tail is found.stale is None


def test_masked_tokens_take_no_part() -> None:
    records = made(noise=0.1)
    for record in records:
        record["trainer"][3] = math.nan
        record["mask"] = [int(place != 3) for place in range(LENGTH)]

    found = report(records)

    assert found.tokens == ROWS * (LENGTH - 1)
    assert math.isfinite(found.k3)


@pytest.mark.parametrize("case", ["rounding of every logit", "top-k", "old weights"])
def test_a_file_becomes_a_picture(case: str, tmp_path: Path) -> None:
    pytest.importorskip("matplotlib")
    log, png = tmp_path / "log.jsonl", tmp_path / "log.png"
    log.write_text("\n".join(json.dumps(record) for record in made(**CASES[case][1])) + "\n")

    found = report(log, png)

    assert found.cause == CASES[case][0]
    assert png.read_bytes().startswith(b"\x89PNG")


def test_one_token_without_entropy_can_be_drawn(tmp_path: Path) -> None:
    pytest.importorskip("matplotlib")

    report([{"trainer": [-1.0], "rollout": [-1.1]}], tmp_path / "one.png")

    assert (tmp_path / "one.png").stat().st_size > 1000


@pytest.mark.parametrize(
    ("line", "remedy"),
    [
        ("{", r"line 2 is no JSON"),
        ("[1]", "line 2 is no JSON object"),
        ('{"trainer": [-1.0]}', "record 2: rollout is NoneType"),
        ('{"trainer": [-1.0], "rollout": [-1.0, -2.0]}', "record 2 has 1 .* 2 values of rollout"),
        ('{"trainer": [-1.0], "rollout": [NaN]}', "record 2: rollout is not finite"),
        ('{"trainer": [[-1.0]], "rollout": [-1.0]}', "no list of numbers"),
        ('{"trainer": [-1.0], "rollout": [-1.0], "lag": 0.5}', "lag is 0.5, but is a whole"),
        ('{"trainer": [-1.0], "rollout": [-1.0], "mask": [1, 0]}', "2 values of mask"),
    ],
)
def test_a_log_of_something_else_is_refused(tmp_path: Path, line: str, remedy: str) -> None:
    log = tmp_path / "log.jsonl"
    log.write_text('{"trainer": [-1.0], "rollout": [-1.0]}\n' + line)

    with pytest.raises(CorrectionError, match=remedy):
        report(log)


def test_no_log_and_an_empty_one_are_refused(tmp_path: Path) -> None:
    with pytest.raises(CorrectionError, match="is no file"):
        report(tmp_path / "log.jsonl")
    with pytest.raises(CorrectionError, match="no unmasked token"):
        report([{"trainer": [], "rollout": []}])
