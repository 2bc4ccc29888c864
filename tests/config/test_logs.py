"""The two variables of FlashRL, and nobody else's logger."""

from __future__ import annotations

import logging
from collections.abc import Iterator

import pytest

from flashquant.config.logs import set_up_logging
from flashquant.errors import ConfigError


@pytest.fixture(autouse=True)
def bare() -> Iterator[logging.Logger]:
    """The logger without handlers, as in a process that has just begun."""
    logger = logging.getLogger("flashquant")
    kept, level = logger.handlers[:], logger.level
    logger.handlers.clear()
    yield logger
    for handler in logger.handlers:
        handler.close()
    logger.handlers[:] = kept
    logger.setLevel(level)


def test_what_matters_is_seen_without_any_setting(bare, capsys):
    set_up_logging({})

    logging.getLogger("flashquant.patches").info("patched")
    logging.getLogger("flashquant.patches").debug("details")

    said = capsys.readouterr().err
    assert said.startswith("INFO")
    assert "flashquant MainProcess[" in said
    assert "details" not in said


def test_a_level_and_a_file(bare, tmp_path):
    set_up_logging(
        {"FLASHRL_LOGGING_LEVEL": "debug", "FLASHRL_LOGGING_FILE": str(tmp_path / "log")}
    )

    logging.getLogger("flashquant.update.session").debug("details")

    assert "details" in (tmp_path / "log").read_text()


def test_a_logger_that_somebody_has_set_up_is_left_alone(bare):
    handler = logging.NullHandler()
    bare.addHandler(handler)

    set_up_logging({"FLASHRL_LOGGING_LEVEL": "DEBUG"})

    assert bare.handlers == [handler]


@pytest.mark.parametrize(
    ("environ", "says"),
    [
        ({"FLASHRL_LOGGING_LEVEL": "LOUD"}, "LOGGING_LEVEL='LOUD'.*INFO"),
        ({"FLASHRL_LOGGING_FILE": "/nowhere/at/all"}, "cannot be written.*name another"),
    ],
)
def test_what_cannot_be_is_refused(bare, environ, says):
    with pytest.raises(ConfigError, match=says):
        set_up_logging(environ)

    assert bare.handlers == []
