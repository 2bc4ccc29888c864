"""The comparison of two arms over seeds."""

from __future__ import annotations

import pytest

from examples.rl import judge


def lines(arm: str, accuracies: dict[int, list[float]]) -> list[dict[str, object]]:
    return [
        {"arm": arm, "seed": seed, "step": step, "accuracy": value}
        for seed, values in accuracies.items()
        for step, value in enumerate(values)
    ]


def test_the_end_is_the_mean_of_the_last_three_looks() -> None:
    """What came before does not count."""
    found = judge.ends(lines("bf16", {0: [0.0, 0.7, 0.8, 0.9]}), "bf16")
    assert found[0] == pytest.approx(0.8)


def test_the_interval_is_student_s_over_paired_seeds() -> None:
    """By hand: differences 0.1, 0.2, 0.3; t(2) = 4.303; 4.303 * 0.1 / sqrt(3)."""
    made = lines("bf16", {0: [0.5], 1: [0.6], 2: [0.7]}) + lines(
        "int8", {0: [0.6], 1: [0.8], 2: [1.0], 3: [0.0]}
    )
    found = judge.difference(made, "int8", "bf16")
    assert found is not None
    assert found.mean == pytest.approx(0.2)
    assert found.half_width == pytest.approx(0.2484, abs=1e-4)
    assert found.is_within(abs(found.mean) + found.half_width)
    assert not found.is_within(found.half_width)


def test_one_seed_has_no_interval() -> None:
    """Nothing is known about its noise."""
    made = lines("bf16", {0: [0.5]}) + lines("int8", {0: [0.6]})
    assert judge.difference(made, "int8", "bf16") is None
