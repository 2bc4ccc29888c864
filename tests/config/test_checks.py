"""Which proofs are on: all of them, unless somebody says no."""

from __future__ import annotations

import pytest

from flashquant.config.checks import Checks, checks_from_env
from flashquant.errors import ConfigError


@pytest.mark.parametrize("environ", [{}, {"FLASHQUANT_LEDGER": ""}, {"FLASHQUANT_DIGEST": "1"}])
def test_everything_is_on_by_default(environ):
    assert checks_from_env(environ) == Checks(ledger=True, digest=True)


@pytest.mark.parametrize("no", ["0", "false", "off", "no"])
def test_each_can_be_turned_off(no):
    assert checks_from_env({"FLASHQUANT_LEDGER": no}) == Checks(ledger=False)
    assert checks_from_env({"FLASHQUANT_DIGEST": no}) == Checks(digest=False)


def test_anything_else_is_refused_with_the_name_of_the_variable():
    with pytest.raises(ConfigError, match=r"FLASHQUANT_DIGEST='maybe'.*set it to 1 or 0"):
        checks_from_env({"FLASHQUANT_DIGEST": "maybe"})


def test_an_unfinished_update_waits_ten_minutes_unless_something_else_is_said():
    assert checks_from_env({}).bracket_timeout == 600
    assert checks_from_env({"FLASHQUANT_BRACKET_TIMEOUT": "2.5"}).bracket_timeout == 2.5
    assert checks_from_env({"FLASHQUANT_BRACKET_TIMEOUT": "0"}).bracket_timeout == 0


@pytest.mark.parametrize("wrong", ["soon", "-1", "inf", "nan"])
def test_what_is_no_number_of_seconds_is_refused(wrong):
    with pytest.raises(ConfigError, match=r"FLASHQUANT_BRACKET_TIMEOUT=.*no number of seconds"):
        checks_from_env({"FLASHQUANT_BRACKET_TIMEOUT": wrong})


def test_they_travel_as_plain_data():
    checks = Checks(ledger=False)

    assert Checks(**checks.model_dump()) == checks
