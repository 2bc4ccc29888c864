"""Where one sync ends and the next begins, told by names alone."""

from __future__ import annotations

from collections.abc import Iterable

import pytest

from flashquant.update.passes import Passes

MODEL = ("embed", "k", "q", "v", "norm")


def take(passes: Passes, *names: str, refused: bool = False) -> bool:
    """One push; whether a new pass began with it."""
    passes.start()
    anew = {passes.begins_with(name) for name in names}
    (passes.note_refused if refused else passes.note_taken)(set(names))
    return True in anew


def begins(passes: Passes, names: Iterable[str]) -> list[str]:
    """One tensor a push; those with which a new pass began."""
    return [name for name in names if take(passes, name)]


@pytest.fixture
def passes() -> Passes:
    return Passes()


def test_a_pass_has_each_name_once(passes):
    assert begins(passes, MODEL) == []
    assert begins(passes, MODEL) == ["embed"]
    assert begins(passes, MODEL) == ["embed"]


@pytest.mark.parametrize("died_after", range(1, len(MODEL)))
def test_a_trainer_that_begins_anew_is_seen_with_its_first_tensor(passes, died_after):
    begins(passes, MODEL[:died_after])

    assert begins(passes, MODEL) == ["embed"]


def test_a_push_belongs_to_one_pass_as_a_whole(passes):
    take(passes, "embed", "k")

    assert take(passes, "q", "k")
    assert begins(passes, ["embed", "v", "q"]) == ["q"]


def test_what_was_refused_may_be_sent_once_more(passes):
    begins(passes, ["embed", "q"])
    take(passes, "k", "v", refused=True)
    take(passes, "k", "v", refused=True)

    assert begins(passes, ["k", "v", "norm"]) == []


def test_what_was_refused_and_comes_after_others_belongs_to_the_next_pass(passes):
    take(passes, "k", refused=True)
    begins(passes, ["q", "v"])

    assert take(passes, "k")


def test_a_pass_whose_first_tensor_was_refused_begins_with_the_second(passes):
    begins(passes, MODEL)
    take(passes, "embed", refused=True)

    assert begins(passes, MODEL[1:]) == ["k"]
    assert begins(passes, MODEL) == ["embed"]


def test_a_refused_push_is_as_if_it_had_not_been(passes):
    begins(passes, MODEL)
    take(passes, "embed", "k", refused=True)

    assert begins(passes, MODEL) == ["embed"]


def test_an_attempt_that_was_refused_and_given_up_is_of_no_pass(passes):
    """A trainer that tries one tensor by itself, and then pushes all of the policy."""
    begins(passes, MODEL)
    take(passes, "norm", refused=True)

    assert begins(passes, MODEL) == ["embed"]


def test_passes_that_always_begin_alike_tell_what_a_stranger_left(passes):
    """It left before it had sent anything that the next one begins with."""
    for _ in range(3):
        begins(passes, MODEL)
    passes.close()
    take(passes, "q", "v")

    assert begins(passes, MODEL) == ["embed"]
    assert begins(passes, MODEL) == ["embed"]


def test_a_trainer_of_another_part_begins_as_it_likes(passes):
    """It sends more than its predecessors, and their first name in the middle."""
    for _ in range(3):
        begins(passes, ["q", "v"])
    passes.close()

    assert begins(passes, MODEL) == []


def test_a_wrong_guess_is_found_out_by_the_order_and_not_made_again(passes):
    """Another order, after a bracket: it holds the old first name in the middle of a layer."""
    for _ in range(3):
        begins(passes, MODEL)
    passes.close()
    other = ("k", "embed", "q", "v", "norm")

    assert begins(passes, other) == ["embed"]
    assert begins(passes, other) == ["k"]
    assert begins(passes, other) == ["k"]


def test_what_a_stranger_left_at_the_very_first_is_understood_afterwards(passes):
    """Its q and v look like the beginning of a pass, until norm comes in the place of embed."""
    take(passes, "q", "v")

    assert begins(passes, MODEL) == ["q"]
    assert begins(passes, MODEL) == ["embed"]
    assert begins(passes, MODEL) == ["embed"]


@pytest.mark.parametrize("died_after", range(1, len(MODEL)))
def test_who_goes_on_where_another_died_is_no_stranger(passes, died_after):
    begins(passes, MODEL[:died_after])

    assert begins(passes, MODEL * 3) == ["embed"] * 3


def test_a_trainer_that_says_when_it_is_done_may_begin_as_it_likes(passes):
    for _ in range(3):
        begins(passes, MODEL)
        passes.close_for_good()

    assert begins(passes, ["q", "embed", "k", "v", "norm"]) == []
