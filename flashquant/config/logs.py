"""Where flashquant's log goes in a process without a logging set-up: FlashRL's two variables.

    FLASHRL_LOGGING_LEVEL=DEBUG      INFO where it is not set
    FLASHRL_LOGGING_FILE=run.log     a file beside standard error, shared by all processes

Only the logger `flashquant` is touched, and only if it has no handler yet.
"""

from __future__ import annotations

import logging
from collections.abc import Mapping
from typing import Final

from flashquant.config import env
from flashquant.errors import ConfigError

_FORMAT: Final = "%(levelname)s %(asctime)s flashquant %(processName)s[%(process)d]: %(message)s"


def set_up_logging(environ: Mapping[str, str]) -> None:
    """Give the logger `flashquant` a level and handlers, unless it has them.

    Raises:
        ConfigError: a level that logging does not know, or a file that cannot be opened.

    """
    logger = logging.getLogger("flashquant")
    level, file = env.LOGGING_LEVEL.read(environ), env.LOGGING_FILE.read(environ)
    if logger.handlers:
        return
    handlers: list[logging.Handler] = [logging.StreamHandler()]
    if file:
        try:
            handlers.append(logging.FileHandler(file))
        except OSError as closed:
            raise ConfigError(
                f"{env.LOGGING_FILE.name}={file!r} cannot be written ({closed}); name another"
            ) from closed
    logger.setLevel(level)
    for handler in handlers:
        handler.setFormatter(logging.Formatter(_FORMAT, "%m-%d %H:%M:%S"))
        logger.addHandler(handler)
