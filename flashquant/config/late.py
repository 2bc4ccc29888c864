"""FLASHRL_CONFIG may be set after vLLM has loaded its plugins, which it does once a process.

An engine that was made before stays as it is. A later one would be served unpatched, in bf16,
without a word. So where the plugin finds the variable unset, it is asked again whenever
vLLM would load its plugins: as every engine begins.
"""

from __future__ import annotations

import functools
import logging
import os
import sys
from collections.abc import Callable
from typing import Any

from flashquant.config import env

logger = logging.getLogger(__name__)

_LOADER = "load_general_plugins"


def ask_again(hook: Callable[[], None], is_patched: Callable[[], bool]) -> None:
    """Call `hook` as the next engine begins after FLASHRL_CONFIG has been set.

    Without effect where vLLM has not been imported: it will load its plugins yet.
    """
    plugins = sys.modules.get("vllm.plugins")
    load: Any = getattr(plugins, _LOADER, None)
    if plugins is None or load is None or hasattr(load, "__flashquant__"):
        return

    @functools.wraps(load)
    def load_and_ask() -> Any:
        loaded = load()
        if env.CONFIG.read(os.environ):
            setattr(plugins, _LOADER, load)
            before = is_patched()
            hook()
            if not before:  # now, for the hook has set up the log
                logger.warning(
                    "FLASHRL_CONFIG was set after vLLM had loaded its plugins in this process. "
                    "Engines from now on are patched; those made before cannot be reloaded."
                )
        return loaded

    load_and_ask.__flashquant__ = _LOADER  # type: ignore[attr-defined]
    setattr(plugins, _LOADER, load_and_ask)
