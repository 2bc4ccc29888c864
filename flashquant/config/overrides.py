"""`overrides` of an entry: layers that are stored in another scheme than the rest.

    overrides: [{match: "*.down_proj", fn: fp8_channel}]

vLLM computes two formats in one engine where both have a form in compressed-tensors, whose
configuration has a group of layers for each; its own online schemes have none.
"""

from __future__ import annotations

from pydantic import BaseModel, ConfigDict, field_validator

from flashquant.config.keep import Kept, read_kept
from flashquant.config.schemes import MIXABLE, NAMES


class Override(BaseModel):
    """Some modules, and their scheme.

    Attributes:
        match: a name, a glob, a word or blocks, as in `keep`.
        fn: a name that FLASHRL_CONFIG takes.

    """

    model_config = ConfigDict(frozen=True, extra="forbid")

    match: Kept
    fn: str

    @property
    def scheme(self) -> str:
        """The canonical name of what they store."""
        return NAMES[self.fn].name

    @field_validator("match", mode="before")
    @classmethod
    def _names_or_blocks_are_matched(cls, match: object) -> object:
        return read_kept(match)

    @field_validator("fn")
    @classmethod
    def _fn_can_stand_beside_another(cls, fn: str) -> str:
        check_mixable(fn)
        return fn


def check_mixable(fn: str) -> None:
    """Refuse what cannot be served beside another scheme.

    Raises:
        ValueError: it is a name of no such scheme.

    """
    if fn in NAMES and NAMES[fn].name in MIXABLE:
        return
    why = f"{fn!r} cannot stand beside another scheme in one engine"
    if fn == "bf16":
        why = "layers stay in bf16 by `keep`"
    elif fn not in NAMES:
        why = f"{fn!r} names no configuration"
    raise ValueError(f"{why}; with overrides, fn may be {', '.join(sorted(MIXABLE))}")
