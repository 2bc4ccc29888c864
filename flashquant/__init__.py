"""flashquant: an unmodified vLLM generates in fp8 or int8, the trainer stays in bf16.

    FLASHRL_CONFIG=int8 python train.py          the plugin patches every vLLM process
    flashquant.reload_weights(llm, weights)      one update, in place, all or nothing
    flashquant.status(llm)                       version, digest, what is still pending

    patch, unpatch, is_patched                   the same without the environment variable
    ReloadReport, Status                         what the two functions return
    kv_scales                                    of an fp8 KV cache, from the trainer's model
    manifest, apply_delta, flashquant.sender     codes, or only what changed, from the trainer
    errors                                       everything that is raised on purpose

Importing this imports neither torch nor vLLM; both wait until something is asked for.
"""

from __future__ import annotations

import os
from typing import TYPE_CHECKING, Any

from flashquant.api import apply_delta, kv_scales, manifest, reload_weights, status

if TYPE_CHECKING:
    from flashquant import errors
    from flashquant.update import ReloadReport, Status

__all__ = [
    "ReloadReport",
    "Status",
    "__version__",
    "apply_delta",
    "errors",
    "is_patched",
    "kv_scales",
    "manifest",
    "patch",
    "patch_from_env",
    "reload_weights",
    "status",
    "unpatch",
]


def patch() -> None:
    """Patch vLLM in this process: every point, or none. A second call changes nothing.

    Where FLASHRL_CONFIG is set, vLLM does this by itself, in every process that it starts, through
    its entry point `vllm.general_plugins`. Call it where plugins are switched off (VLLM_PLUGINS),
    or to see at once whether this vLLM can be patched. Engines that exist already stay as they
    are; engines made later are quantized if FLASHRL_CONFIG is set then, and are vLLM's own if not.

    Raises:
        UnsupportedEngine: the installed vLLM is outside the tested range (the extra
            `flashquant[vllm]` says which that is).
        PatchError: a function that would be wrapped is missing, has other parameters than the
            tested versions, or has been replaced by another library. Nothing is patched then.

    Example:
        >>> os.environ["FLASHRL_CONFIG"] = "int8"
        >>> flashquant.patch()
        >>> llm = LLM("Qwen/Qwen2.5-0.5B-Instruct")

    """
    from flashquant import patches

    patches.patch()


def unpatch() -> None:
    """Take every patch of this process out again; vLLM is then as it was, name by name.

    Without effect where nothing is patched. Engines that were made while vLLM was patched keep
    their quantized weights and can still be reloaded as a model or a worker; engines made later are
    vLLM's own, whatever FLASHRL_CONFIG says.

    Raises:
        PatchError: another library has wrapped a function after flashquant did, so the original
            cannot be put back without taking the other's away; all other points are out.

    Example:
        >>> flashquant.unpatch()
        >>> flashquant.is_patched()
        False

    """
    from flashquant import patches

    patches.unpatch()


def is_patched() -> bool:
    """Whether vLLM is patched in this process. Imports nothing.

    Returns:
        True from `patch()` (or vLLM's loading of its plugins under FLASHRL_CONFIG) until
        `unpatch()`. It says nothing about workers in other processes: `status(llm)` does, by
        raising where they are not patched.

    Example:
        >>> assert flashquant.is_patched(), "set FLASHRL_CONFIG before the engine is made"

    """
    import sys

    patches = sys.modules.get("flashquant.patches")
    return patches is not None and bool(patches.is_patched())


def patch_from_env() -> None:
    """Patch vLLM if FLASHRL_CONFIG is set; vLLM's plugin hook, which need not be called.

    vLLM calls it in each of its processes (`vllm.general_plugins`). While FLASHRL_CONFIG is unset
    or empty it does nothing, and imports neither torch nor vLLM; it is then asked again whenever an
    engine begins, so the variable may also be set after vLLM has been imported. Otherwise it reads
    the configuration, sets up the logger `flashquant` unless it has handlers
    (FLASHRL_LOGGING_LEVEL, FLASHRL_LOGGING_FILE), and calls `patch()`.

    Raises:
        ConfigError: FLASHRL_CONFIG names no scheme and no file, the file says something impossible,
            or another variable of flashquant's does (`flashquant config --env` lists them). Nothing
            has been patched.
        LocateError: a ConfigError: the file cannot be found here, or be had from the Hub.
        UnsupportedEngine, PatchError: as `patch()`.

    Example:
        >>> flashquant.patch_from_env()

    """
    from flashquant.config import env

    if not env.CONFIG.read(os.environ):
        from flashquant.config.late import ask_again

        ask_again(patch_from_env, is_patched)
        return
    from flashquant.config.logs import set_up_logging
    from flashquant.config.schema import config_from_env

    config_from_env(os.environ)
    env.check(os.environ)
    set_up_logging(os.environ)
    patch()


def __getattr__(name: str) -> Any:
    """What is imported, or looked up, when it is first asked for."""
    if name == "__version__":
        from importlib.metadata import version

        return version("flashquant")
    if name == "errors":
        from importlib import import_module

        return import_module("flashquant.errors")
    if name in ("ReloadReport", "Status"):
        from flashquant import update

        return getattr(update, name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")


def __dir__() -> list[str]:
    return sorted(__all__)
