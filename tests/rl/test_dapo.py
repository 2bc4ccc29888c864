"""Groups, masks and padding of one step's batch."""

from __future__ import annotations

import torch

from examples.rl import dapo, task
from examples.rl.rollout import Episode
from examples.rl.task import Problem

PROBLEM = Problem(47, 85)


def episode(text: str) -> Episode:
    made = Episode(PROBLEM, ended=True)
    made.wrote(task.encode(text), [-0.5] * len(text))
    return made


def called() -> Episode:
    """One that asked for the first column, and answered right."""
    made = Episode(PROBLEM, ended=True)
    made.wrote(task.encode("?"), [-0.1])
    made.was_told("12")
    made.wrote(task.encode("231."), [-0.2] * 4)
    return made


def test_advantages_have_mean_zero_and_deviation_one_in_each_group() -> None:
    """One right among four."""
    found = dapo.advantages(torch.tensor([[1.0, 0.0, 0.0, 0.0]]))
    torch.testing.assert_close(found.mean(), torch.tensor(0.0))
    torch.testing.assert_close(found.std(correction=0), torch.tensor(1.0))
    assert found[0, 0] > 0 > found[0, 1]


def test_a_group_of_equals_says_nothing() -> None:
    """All right or all wrong: zeros, and no division by nothing."""
    assert not dapo.advantages(torch.tensor([[1.0, 1.0], [0.0, 0.0]])).any()


def test_groups_that_teach_nothing_are_dropped() -> None:
    """DAPO's dynamic sampling."""
    right, wrong = episode("231."), episode("230.")
    made = dapo.batch([right, right, right, wrong], 2)
    assert made is not None
    assert len(made.tokens) == 2
    assert dapo.batch([right, right, wrong, wrong], 2) is None


def test_the_mask_is_true_on_exactly_what_the_policy_chose() -> None:
    """Neither prompt, padding, nor the calculator's answer."""
    made = dapo.batch([called(), episode("230.")], 2)
    assert made is not None
    chosen = [
        task.decode(row[1:][keep].tolist())
        for row, keep in zip(made.tokens, made.mask, strict=True)
    ]
    assert chosen == ["?231.", "230."]


def test_each_logprob_stands_under_its_token() -> None:
    """Column t of the log-probs is token t + 1, as the trainer computes them."""
    made = dapo.batch([called(), episode("230.")], 2)
    assert made is not None
    answer = made.rollout_logprobs[0, task.PROMPT_LENGTH - 1 :]
    torch.testing.assert_close(answer, torch.tensor([-0.1, 0, 0, -0.2, -0.2, -0.2, -0.2]))
    assert not made.rollout_logprobs[~made.mask].any()
