"""Whether the live weights may be served, and may be written; if not, what mends it.

whole    every layer serves one and the same update
stale    some parameters are lost or mixed, until each of them has arrived again
moved    a live tensor left its memory; only a restart mends that
asleep   the engine has put its weights away
"""

from __future__ import annotations

from collections.abc import Iterable

from flashquant.errors import SleepingWeights, TornWeights
from flashquant.update.wording import some_of


class ServingState:
    """The state of one model's live weights between two updates."""

    def __init__(self) -> None:
        self.stale: frozenset[str] = frozenset()
        self.moved = False
        self.restoring = False  # stays so where putting the old weights back failed
        self.asleep = False

    @property
    def torn(self) -> bool:
        """Whether what is live is a mixture, which must not generate."""
        return bool(self.complaint)

    @property
    def complaint(self) -> str:
        """Why nothing may be generated, and what to do about it; nothing where all is well."""
        if self.moved:
            return (
                "a live tensor moved in an earlier update, and captured graphs still read the old "
                "memory. Restart the engine."
            )
        if self.restoring:
            return (
                "an update failed, and so did putting the old weights back. The next push tries it "
                "again; if that fails too, restart the engine."
            )
        if self.stale:
            return (
                "the live weights are a mixture of two policies, or were discarded: an update "
                "without undo failed, the engine slept at level 2, or vLLM's reset_weights zeroed "
                "them. Push one complete update; "
                f"generation resumes when {some_of(sorted(self.stale))} have arrived again."
            )
        return ""

    def tear(self, parameters: Iterable[str]) -> None:
        """These parameters no longer hold what they should."""
        self.stale |= frozenset(parameters)

    def heal(self, parameters: Iterable[str]) -> None:
        """These parameters have arrived, and are live."""
        self.stale -= frozenset(parameters)

    def check_servable(self) -> None:
        """Raise TornWeights rather than let a mixture of two policies generate."""
        if complaint := self.complaint:
            raise TornWeights(complaint)

    def check_writable(self) -> None:
        """Raise SleepingWeights while there is no memory to write into."""
        if self.asleep:
            raise SleepingWeights(
                "the engine's weights are asleep, so nothing can be written into them. Call "
                "wake_up() (or wake_up(tags=['weights'])) before you push."
            )
