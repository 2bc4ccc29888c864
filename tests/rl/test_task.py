"""The sums, their verifier, and the calculator."""

from __future__ import annotations

import pytest
import torch

from examples.rl import task
from examples.rl.task import Problem


def test_the_answer_is_the_sum_reversed_and_ended() -> None:
    """From the last digit to the first, as one adds on paper."""
    problem = Problem(47, 85)
    assert (problem.prompt, problem.answer) == ("47+85=", "231.")
    assert len(problem.prompt) == task.PROMPT_LENGTH
    assert len(problem.answer) == task.ANSWER_LENGTH


def test_small_numbers_keep_their_zeros() -> None:
    """Every prompt has one length, and so has every answer."""
    problem = Problem(3, 5)
    assert (problem.prompt, problem.answer) == ("03+05=", "800.")


@pytest.mark.parametrize("written", ["230.", "231", "231.1", "23.", "", "132.", " 231."])
def test_only_the_right_answer_and_nothing_after_it_is_rewarded(written: str) -> None:
    """Neither a wrong digit nor a missing end passes."""
    assert task.reward(Problem(47, 85), tokens_of(written)) == 0
    assert task.reward(Problem(47, 85), task.encode("231.")) == 1


def tokens_of(text: str) -> list[int]:
    """A space stands for a token without a character."""
    return [task.PADDED_VOCABULARY - 1 if c == " " else task.encode(c)[0] for c in text]


def test_what_the_calculator_said_is_no_part_of_the_answer() -> None:
    """The worked answer is right by what the policy itself wrote."""
    problem = Problem(47, 85)
    assert problem.worked == "?122?1231."
    own = [c == "1" for c in "1001100111"]
    assert task.reward(problem, task.encode(problem.worked), own) == 1
    assert task.reward(problem, task.encode(problem.worked)) == 0


def test_the_calculator_adds_a_column_without_its_carry() -> None:
    """Units, tens, and no third column."""
    assert [Problem(47, 85).column(place) for place in (0, 1, 2)] == ["12", "12", "00"]


def test_training_never_sees_a_held_out_sum() -> None:
    """The two sets share nothing, and the same seed draws the same problems."""
    train = task.problems(500, torch.Generator().manual_seed(1))
    held_out = task.problems(500, torch.Generator().manual_seed(1), held_out=True)
    assert not set(train) & set(held_out)
    assert train == task.problems(500, torch.Generator().manual_seed(1))


def test_tokens_and_text_are_one() -> None:
    """Encoding loses nothing."""
    assert task.decode(task.encode("47+85=?122.")) == "47+85=?122."
