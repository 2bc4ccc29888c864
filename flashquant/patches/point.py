"""A seam in the engine, as a value: where it is, what shape it has, what goes around it.

Applying a point returns its undo, and the undo refuses to lie: it takes out what
it put in, or says what is in the way. This room needs neither torch nor vLLM
until a point is applied.
"""

from __future__ import annotations

import functools
import importlib
import inspect
from collections.abc import Callable
from dataclasses import dataclass
from types import EllipsisType, FunctionType
from typing import Any

from packaging.specifiers import SpecifierSet

from flashquant.errors import PatchError

Undo = Callable[[], None]

_ABSENT = object()


@dataclass(frozen=True)
class PatchPoint:
    """One function of the engine and the wrapper that goes around it.

    Attributes:
        target: `module:name` or `module:Class.name`; the module that *uses* the
            name, where it was imported by value.
        expects: parameter names the seam must have, in order; a final `...` for
            whatever else it takes, where the wrapper passes it through. None for
            a seam that must not be there yet: the wrapper becomes a new method.
        wrapper: called as `wrapper(original, *args, **kwargs)`; a new method is
            called as it is.
        within: the versions of vLLM that have the seam, or that lack the method. In
            any other one a seam must be missing: what has not been looked at is
            not passed over.

    """

    target: str
    expects: tuple[str | EllipsisType, ...] | None
    wrapper: Callable[..., Any]
    within: str = ""

    def is_in(self, version: str) -> bool:
        """Whether this version of vLLM should have the seam."""
        return SpecifierSet(self.within).contains(version, prereleases=True)

    def check(self) -> None:
        """Raise PatchError unless the seam is there, in the expected shape, and free."""
        owner, name = self._resolve()
        found = inspect.getattr_static(owner, name, _ABSENT)
        if self.expects is None:
            if found is not _ABSENT:
                raise PatchError(f"{self.target} exists already; flashquant wanted to add it")
            return
        if not isinstance(found, FunctionType):
            what = "nothing" if found is _ABSENT else type(found).__name__
            raise PatchError(
                f"{self.target} is {what}, but flashquant wraps a plain function there"
            )
        if hasattr(found, "__flashquant__"):
            raise PatchError(f"{self.target} is wrapped by flashquant already")
        shape = tuple(inspect.signature(found).parameters)
        if not _has_shape(shape, self.expects):
            raise PatchError(
                f"{self.target} takes {shape}, but flashquant was written against {self.expects}. "
                "This vLLM is laid out differently; install a tested one, or unset FLASHRL_CONFIG."
            )

    def check_absent(self) -> None:
        """Raise PatchError where the seam is there, in a vLLM that should not have it."""
        if self.expects is None:
            return  # what would be added here, other versions may have of their own
        try:
            owner, name = self._resolve()
        except PatchError:
            return
        if isinstance(inspect.getattr_static(owner, name, _ABSENT), FunctionType):
            raise PatchError(
                f"{self.target} is there, but flashquant knows it in vllm{self.within} only, and "
                "would pass it over. Install a tested version, or unset FLASHRL_CONFIG."
            )

    def apply(self) -> Undo:
        """Put the wrapper in place and return the function that takes it out again."""
        self.check()
        owner, name = self._resolve()
        # vars(), not getattr(): an inherited function is not this owner's to restore.
        saved = vars(owner).get(name, _ABSENT)
        patched = self._patched(inspect.getattr_static(owner, name, None))
        setattr(owner, name, patched)

        def undo() -> None:
            if vars(owner).get(name) is not patched:
                raise PatchError(
                    f"cannot unpatch {self.target}: someone wrapped it after flashquant did. "
                    "Undo theirs first."
                )
            if saved is _ABSENT:
                delattr(owner, name)
            else:
                setattr(owner, name, saved)

        return undo

    def _patched(self, original: Any) -> Callable[..., Any]:
        wrapper = self.wrapper
        if self.expects is None:
            return wrapper

        @functools.wraps(original)
        def patched(*args: Any, **kwargs: Any) -> Any:
            return wrapper(original, *args, **kwargs)

        patched.__flashquant__ = self.target  # type: ignore[attr-defined]
        return patched

    def _resolve(self) -> tuple[Any, str]:
        """The object whose attribute the seam is, and the attribute's name."""
        module_name, _, path = self.target.partition(":")
        *outer, name = path.split(".")
        try:
            owner: Any = importlib.import_module(module_name)
            for part in outer:
                owner = getattr(owner, part)
        except (ImportError, AttributeError) as missing:
            raise PatchError(
                f"{self.target} is not there ({missing}). This vLLM is laid out differently; "
                "install a tested one, or unset FLASHRL_CONFIG."
            ) from missing
        return owner, name


def _has_shape(found: tuple[str, ...], expects: tuple[str | EllipsisType, ...]) -> bool:
    if expects[-1:] == (...,):
        expects = expects[:-1]
        found = found[: len(expects)]
    return found == expects
