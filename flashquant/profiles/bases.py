"""Which checkpoint a profile belongs to, noted so that another one is told apart from it."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import replace
from typing import Final

from torch import Tensor

from flashquant.errors import ProfileError
from flashquant.profiles.header import Base
from flashquant.profiles.profile import Profile, fingerprint

_PLACES: Final = (0.0, 0.25, 0.5, 0.75, 1.0)  # where in the checkpoint fingerprints are taken


def with_base(
    profile: Profile, model: str, revision: str | None, weights: Iterable[tuple[str, Tensor]]
) -> Profile:
    """The profile, and the fingerprints of five tensors of its W8A8 checkpoint.

    Weight scales are taken: they are small, and no two models share them.

    Args:
        profile: whatever base it has is replaced.
        model: name or path of the checkpoint, for people.
        revision: of its repository.
        weights: the checkpoint.

    Raises:
        ProfileError: the checkpoint holds no scales of the weights that the profile speaks of.

    """
    known = {f"{name}_scale" for name in profile.entries}
    found = {name: fingerprint(tensor) for name, tensor in weights if name in known}
    if not found:
        raise ProfileError(
            f"{model} holds no weight scales of what {profile.source} speaks of. Name the W8A8 "
            "checkpoint that it was made with."
        )
    names = sorted(found)
    chosen = {names[round(place * (len(names) - 1))]: None for place in _PLACES}
    base = Base(model=model, revision=revision, fingerprint={name: found[name] for name in chosen})
    return replace(profile, base=base)
