"""A run says at once that there is no room for it."""

from __future__ import annotations

import pytest

from tests.support.room import GB, lacking


@pytest.mark.parametrize("whole", [True, False])
def test_a_run_with_enough_room_begins(whole: bool) -> None:
    assert lacking(whole=whole, free=lambda _: 4 * GB) == ""


def test_a_full_disk_is_named_with_what_it_has_should_have_and_what_to_do() -> None:
    said = lacking(whole=True, free=lambda _: GB // 5)

    assert "has 0.2 GB free, and these tests take up to 4.0 GB of it: remove what" in said


def test_a_few_named_tests_need_less() -> None:
    assert lacking(whole=False, free=lambda _: GB) == ""
    assert lacking(whole=False, free=lambda _: 0)
