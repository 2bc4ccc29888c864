"""flashquant: an unmodified vLLM generates in fp8 or int8, the trainer stays in bf16.

Importing this imports neither torch nor vLLM; both wait until something is asked for.

    FLASHRL_CONFIG=int8 python train.py          the plugin patches every vLLM process
    flashquant.reload_weights(llm, weights)      one update, in place, all or nothing
    flashquant.status(llm)                       version, digest, what is still pending
"""

from __future__ import annotations

import os
from collections.abc import Awaitable
from typing import TYPE_CHECKING, Any, Protocol, overload

if TYPE_CHECKING:
    from flashquant.plan import Weights
    from flashquant.sender import Delta, Manifest
    from flashquant.update import ReloadReport, Status

__all__ = [
    "__version__",
    "apply_delta",
    "is_patched",
    "manifest",
    "patch",
    "patch_from_env",
    "reload_weights",
    "status",
    "unpatch",
]


class _AsyncEngine(Protocol):
    """vLLM's `AsyncLLM`, as far as it is told apart from an `LLM`."""

    async def collective_rpc(self, method: str) -> list[Any]: ...


def patch() -> None:
    """Patch vLLM in this process: all points or none; twice is once.

    Raises:
        UnsupportedEngine: the installed vLLM is outside the tested range.
        PatchError: a seam is missing, taken, or shaped differently.

    """
    from flashquant import patches

    patches.patch()


def unpatch() -> None:
    """Undo `patch()` exactly."""
    from flashquant import patches

    patches.unpatch()


def is_patched() -> bool:
    """Whether vLLM is patched in this process."""
    import sys

    patches = sys.modules.get("flashquant.patches")
    return patches is not None and bool(patches.is_patched())


def patch_from_env() -> None:
    """vLLM's plugin hook: patch when FLASHRL_CONFIG is set, else do nothing until it is.

    Raises:
        ConfigError: FLASHRL_CONFIG or a logging variable says something impossible.

    """
    if not os.environ.get("FLASHRL_CONFIG"):
        from flashquant.config.late import ask_again

        ask_again(patch_from_env, is_patched)
        return
    from flashquant.config.logs import set_up_logging
    from flashquant.config.schema import config_from_env

    config_from_env(os.environ)
    set_up_logging(os.environ)
    patch()


# An AsyncLLM is an object too; the first signature that fits is the one that holds.
@overload
def reload_weights(  # type: ignore[overload-overlap]
    target: _AsyncEngine,
    weights: Weights,
    *,
    atomic: bool = True,
    strict: bool = True,
    prepare: bool = False,
) -> Awaitable[ReloadReport]: ...
@overload
def reload_weights(
    target: object,
    weights: Weights,
    *,
    atomic: bool = True,
    strict: bool = True,
    prepare: bool = False,
) -> ReloadReport: ...
def reload_weights(
    target: Any,
    weights: Weights,
    *,
    atomic: bool = True,
    strict: bool = True,
    prepare: bool = False,
) -> ReloadReport | Awaitable[ReloadReport]:
    """Bring one complete set of bf16 weights into a serving engine, in place.

    An `AsyncLLM` is awaited. See `flashquant.patches.remote.target.reload_weights`.
    """
    from flashquant.patches.remote import target as targets

    report: ReloadReport = targets.reload_weights(
        target, weights, atomic=atomic, strict=strict, prepare=prepare
    )
    return report


@overload
def status(target: _AsyncEngine) -> Awaitable[Status]: ...  # type: ignore[overload-overlap]
@overload
def status(target: object) -> Status: ...
def status(target: Any) -> Status | Awaitable[Status]:
    """How an engine, a worker or a model stands; an `AsyncLLM` is awaited.

    See `flashquant.patches.remote.target.status`.
    """
    from flashquant.patches.remote import target as targets

    found: Status = targets.status(target)
    return found


@overload
def manifest(target: _AsyncEngine) -> Awaitable[Manifest]: ...  # type: ignore[overload-overlap]
@overload
def manifest(target: object) -> Manifest: ...
def manifest(target: Any) -> Manifest | Awaitable[Manifest]:
    """What an engine, a worker or a model wants to be sent, for a `flashquant.sender.Sender`.

    Names, shapes and dtypes of a complete update: codes and scales where the engine takes them,
    else floats; its scheme, its version and the digest of the policy it serves. Plain data:
    `.model_dump_json()` travels. An `AsyncLLM` is awaited.
    See `flashquant.patches.remote.target.manifest`.
    """
    from flashquant.patches.remote import target as targets

    found: Manifest = targets.manifest(target)
    return found


@overload
def apply_delta(  # type: ignore[overload-overlap]
    target: _AsyncEngine, delta: Delta | str | os.PathLike[str]
) -> Awaitable[ReloadReport]: ...
@overload
def apply_delta(target: object, delta: Delta | str | os.PathLike[str]) -> ReloadReport: ...
def apply_delta(
    target: Any, delta: Delta | str | os.PathLike[str]
) -> ReloadReport | Awaitable[ReloadReport]:
    """Bring what changed into a serving engine: onto the policy it starts from, or not at all.

    `delta` is a bundle of a `flashquant.sender.Sender`, or the file that one was saved to. An
    `AsyncLLM` is awaited. See `flashquant.patches.remote.target.apply_delta`.
    """
    from flashquant.patches.remote import target as targets

    report: ReloadReport = targets.apply_delta(target, delta)
    return report


def __getattr__(name: str) -> str:
    if name == "__version__":
        from importlib.metadata import version

        return version("flashquant")
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
