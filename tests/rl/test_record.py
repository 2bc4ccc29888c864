"""What a run leaves behind, and how it goes on from there."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from torch import nn

from examples.rl import plot
from examples.rl.record import AlreadyRecorded, Record
from examples.rl.settings import ARMS, UnknownArm, arm


def trained(seed: int, steps: int) -> tuple[nn.Linear, torch.optim.AdamW]:
    """A model that has taken some steps, and its optimizer."""
    torch.manual_seed(seed)
    model = nn.Linear(4, 4)
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.1)
    step(model, optimizer, steps)
    return model, optimizer


def step(model: nn.Linear, optimizer: torch.optim.AdamW, count: int) -> None:
    for _ in range(count):
        model(torch.ones(4)).square().sum().backward()
        optimizer.step()
        optimizer.zero_grad()


def test_a_resumed_run_goes_on_bit_for_bit(tmp_path: Path) -> None:
    """Weights and the optimizer's moments are both put back."""
    model, optimizer = trained(0, 3)
    record = Record(tmp_path / "run")
    record.save(3, model, optimizer)
    step(model, optimizer, 2)
    other, other_optimizer = trained(1, 0)
    assert record.resume(other, other_optimizer) == 3
    step(other, other_optimizer, 2)
    assert torch.equal(other.weight, model.weight)


def test_lines_after_the_checkpoint_are_dropped(tmp_path: Path) -> None:
    """Their steps are made again, so none stands there twice."""
    record = Record(tmp_path / "run")
    model, optimizer = trained(0, 1)
    for number in (1, 2, 3):
        record.write({"step": number})
        if number == 2:
            record.save(2, model, optimizer)
    record.resume(model, optimizer)
    assert [line["step"] for line in record.read()] == [1, 2]


def test_without_a_checkpoint_a_run_begins_anew(tmp_path: Path) -> None:
    """Lines that lead nowhere are dropped too."""
    record = Record(tmp_path / "run")
    record.write({"step": 1})
    assert record.resume(*trained(0, 1)) == 0
    assert record.read() == []


def test_half_a_line_is_not_read(tmp_path: Path) -> None:
    """What a killed run leaves."""
    record = Record(tmp_path / "run")
    record.write({"step": 1})
    with (tmp_path / "run" / "metrics.jsonl").open("a") as file:
        file.write('{"step": 2, "rew')
    assert record.read() == [{"step": 1}]


def test_only_the_newest_checkpoint_is_kept(tmp_path: Path) -> None:
    """A whole one, under its final name."""
    record = Record(tmp_path / "run")
    model, optimizer = trained(0, 1)
    record.save(9, model, optimizer)
    record.save(10, model, optimizer)
    assert [folder.name for folder in (tmp_path / "run").iterdir()] == ["step-000010"]


def test_a_run_that_was_recorded_is_not_written_over(tmp_path: Path) -> None:
    """Hours of somebody's compute."""
    record = Record(tmp_path / "run")
    record.begin()
    record.write({"step": 1})
    with pytest.raises(AlreadyRecorded, match="--resume"):
        record.begin()
    assert record.read() == [{"step": 1}]


def test_the_picture_is_made(tmp_path: Path) -> None:
    """From lines in which some metrics are missing, as they are in reality."""
    pytest.importorskip("matplotlib")
    lines = [
        {"arm": "bf16", "seed": seed, "step": n, "reward": n / 9, "k3": 1e-3, "sync_seconds": 0.1}
        for seed in (0, 1)
        for n in (1, 2)
    ]
    plot.draw(lines, tmp_path / "plots" / "learning.png")
    assert (tmp_path / "plots" / "learning.png").stat().st_size > 10_000
    assert plot.curves(lines, "reward") == {"bf16": [(1, [1 / 9] * 2), (2, [2 / 9] * 2)]}


def test_every_arm_without_correction_has_a_twin_with_it() -> None:
    """Or the comparison would compare two things at once."""
    for name in ("int8", "fp8", "coarse"):
        bare, corrected = ARMS[name], ARMS[f"{name}+tis"]
        assert bare.cap is None
        assert corrected.cap is not None
        assert (bare.scheme, bare.bits) == (corrected.scheme, corrected.bits)


def test_an_unknown_arm_is_told_the_known_ones() -> None:
    """The error says what there is."""
    with pytest.raises(UnknownArm, match=r"'int9'.*int8\+tis"):
        arm("int9")
