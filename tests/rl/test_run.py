"""A few steps on the real engine: pushed, learned from, resumed, sampled from a nucleus."""

from __future__ import annotations

import copy
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from transformers import LlamaForCausalLM

from examples.rl import dapo, task
from examples.rl.model import fresh, logprobs, pushed, save
from examples.rl.record import Record
from examples.rl.rollout import Engine, Episode
from examples.rl.settings import Settings, arm
from examples.rl.train import Run

pytestmark = pytest.mark.engine

SETTINGS = Settings(steps=3, prompts=4, group=4, held_out=4, checkpoint_every=1, updates=1)


@pytest.fixture(scope="module")
def model() -> LlamaForCausalLM:
    return fresh(SETTINGS)


@pytest.fixture(scope="module")
def engine(model: LlamaForCausalLM, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Engine]:
    folder = tmp_path_factory.mktemp("rl") / "start"
    save(model, folder)
    with pytest.MonkeyPatch.context() as patched:
        patched.setenv("FLASHRL_CONFIG", "int8")  # put back at the end
        yield Engine("int8", folder, seats=16)


@pytest.fixture(autouse=True)
def odd_first_tokens_are_right(monkeypatch: pytest.MonkeyPatch) -> None:
    """Random weights never add up; something that some of their answers are rewarded for."""
    monkeypatch.setattr(Episode, "reward", property(lambda self: float(self.tokens[0] % 2)))


def test_an_interrupted_run_ends_where_a_whole_one_does(
    tmp_path: Path, model: LlamaForCausalLM, engine: Engine
) -> None:
    """Same rewards, same divergences, to the bit, several turns an episode."""

    def run(name: str, steps: int, *, resume: bool = False) -> list[dict[str, object]]:
        record = Record(tmp_path / name)
        Run(
            arm("int8+tis+tool"),
            0,
            replace(SETTINGS, steps=steps),
            model=copy.deepcopy(model),
            engine=engine,
            record=record,
        ).go(resume=resume, progress=lambda step, line: None)
        return [{k: v for k, v in one.items() if "seconds" not in k} for one in record.read()]

    whole = run("whole", 3)
    run("halves", 1)
    halves = run("halves", 3, resume=True)
    assert [line["step"] for line in whole] == [1, 2, 3]
    assert all(line["loss"] for line in whole)
    assert whole[1:] == halves[1:]


def test_a_trainer_that_repeats_the_cut_finds_the_log_probs_of_the_rollout(
    model: LlamaForCausalLM, engine: Engine
) -> None:
    """Half the probability is cut off: log 2 on every token, which the vocabulary's norm misses."""
    engine.push(pushed(model))
    asked = task.problems(SETTINGS.prompts, torch.Generator().manual_seed(0))
    batch = dapo.batch(engine.play(asked, SETTINGS.group, seed=0, top_p=0.5), SETTINGS.group)
    assert batch is not None
    cut = replace(arm("top-p+mask"), top_p=0.5).truncation
    with torch.no_grad():
        gaps = [
            (logprobs(model, batch.tokens, kept) - batch.rollout_logprobs)[batch.mask].mean()
            for kept in (cut, None)
        ]
    assert abs(gaps[0]) < 0.05
    assert gaps[1] < -0.5
