"""Three steps on the real engine: pushed, learned from, resumed."""

from __future__ import annotations

import copy
from pathlib import Path

import pytest

from examples.rl.model import fresh, save
from examples.rl.record import Record
from examples.rl.rollout import Engine, Episode
from examples.rl.settings import Settings, arm
from examples.rl.train import Run

pytestmark = pytest.mark.engine

SETTINGS = Settings(steps=3, prompts=4, group=4, held_out=4, checkpoint_every=1, updates=1)


def test_an_interrupted_run_ends_where_a_whole_one_does(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Same rewards, same divergences, to the bit, several turns an episode."""
    monkeypatch.setenv("FLASHRL_CONFIG", "int8")  # put back at the end
    # Random weights never add up right; something that some of their answers are rewarded for.
    monkeypatch.setattr(Episode, "reward", property(lambda self: float(self.tokens[0] % 2)))
    model = fresh(SETTINGS)
    save(model, tmp_path / "start")
    engine = Engine("int8", tmp_path / "start", seats=16)

    def run(name: str, steps: int, *, resume: bool = False) -> list[dict[str, object]]:
        record = Record(tmp_path / name)
        settings = Settings(**{**vars(SETTINGS), "steps": steps})
        Run(
            arm("int8+tis+tool"),
            0,
            settings,
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
