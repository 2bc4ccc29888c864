"""Whether a profile and a checkpoint belong together, seen from what is loaded.

A checkpoint of codes holds the weight scales, norms and fingerprints that its profile was made
with. One of floats need not hold the same bits, for it may have been trained since, but its large
rows are those that were calibrated.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from collections.abc import Set as AbstractSet
from typing import Final

import torch
from torch import Tensor

from flashquant.errors import ProfileError
from flashquant.profiles.profile import Entry, Profile, fingerprint
from flashquant.schemes import row_absmax, row_chunks, scaled

_SHOWN: Final = 4
# FlashRL's output_scale is 1 / weight_scale for six of seven layers; only where a smoothing
# of outputs is folded into it is it another number. Rounding alone is a hundred times less.
_SAME: Final = 1e-4
# How alike the maxima of rows are, as correlation: about 1 after any training, 0 by chance.
_ALIKE: Final = 0.5


def check_profile_fits(profile: Profile, weights: Iterable[tuple[str, Tensor]]) -> None:
    """Look whether a profile and a W8A8 checkpoint belong together, without an engine.

    Raises:
        ProfileError: they do not; lists the first few misfits.

    """
    fit = Fit(profile, starts_on_floats=False)
    for name, tensor in weights:
        fit.note(name, tensor)
    fit.check()


class Fit:
    """What a checkpoint held, beside what its profile says.

    Attributes:
        weight_scales: of a checkpoint of codes, on the host, by the name of the weight.

    Args:
        profile: as it was read.
        starts_on_floats: the checkpoint is none of codes.
        kept: names of weights of which the engine makes no codes.

    """

    def __init__(
        self, profile: Profile, *, starts_on_floats: bool, kept: AbstractSet[str] = frozenset()
    ) -> None:
        self.weight_scales: dict[str, Tensor] = {}
        self._profile, self._starts_on_floats, self._kept = profile, starts_on_floats, kept
        self._entries = {name: profile.entries[name] for name in profile.entries}
        self._fingerprinted = frozenset(profile.base.fingerprint) if profile.base else frozenset()
        self._forms: dict[str, tuple[tuple[int, ...], torch.dtype]] = {}
        self._fingerprints: dict[str, str] = {}
        self._alike: dict[str, float] = {}  # of floats: to what was calibrated

    def note(self, name: str, tensor: Tensor) -> None:
        """The checkpoint holds this tensor."""
        if self._starts_on_floats:
            entry = self._entries.get(name)
            if entry is not None and entry.weight_scale is not None:
                self._alike[name] = _likeness(tensor, entry.to(tensor.device))
            return
        if name in self._fingerprinted:
            self._fingerprints[name] = fingerprint(tensor)
        self.note_stored(name, tensor)

    def note_stored(self, name: str, tensor: Tensor) -> None:
        """The engine starts with this tensor, read so or made of floats."""
        self._forms[name] = (tuple(tensor.shape), tensor.dtype)
        weight = name.removesuffix("_scale")
        if weight != name and weight in self._entries:
            # A copy: loaders hand out views of files and of buffers.
            self.weight_scales[weight] = tensor.detach().clone().cpu()

    def check(self) -> None:
        """Every quantized layer has an entry, every entry a layer, and all of them agree.

        Raises:
            ProfileError: they do not; lists the first few misfits.

        """
        misfits = [*self._misfits_of_checkpoint(), *self._misfits_of_layers()]
        if not misfits:
            return
        listed = "; ".join(misfits[:_SHOWN])
        more = f"; and {len(misfits) - _SHOWN} more" if len(misfits) > _SHOWN else ""
        raise ProfileError(
            f"{self._profile.source} does not fit this checkpoint: {listed}{more}. "
            "Start the engine on the checkpoint that it was made with (`model:`), or make a "
            "profile for this one."
        )

    def _misfits_of_checkpoint(self) -> Iterator[str]:
        if not self._forms:
            yield "no weight of a checkpoint was loaded"
        if self._starts_on_floats:
            yield from self._strange_floats()
            return
        base = self._profile.base
        for name, wanted in (base.fingerprint if base else {}).items():
            found = self._fingerprints.get(name)
            if found != wanted:
                has = "has no such tensor" if found is None else f"holds {found[:12]} there"
                yield f"{name} should be {wanted[:12]} (sha256), but the checkpoint {has}"
        if not self._fingerprinted and self._forms:
            yield from self._unknown_scales()

    def _strange_floats(self) -> Iterator[str]:
        """A trained policy has other bits than what was calibrated, but the same large rows."""
        strange = [name for name, alike in self._alike.items() if alike < _ALIKE]
        if 2 * len(strange) > len(self._alike):
            yield (
                f"the rows of {len(strange)} of {len(self._alike)} layers have other maxima "
                f"than those that were calibrated (correlation {self._alike[strange[0]]:.2f} "
                f"in {strange[0]}), so it is another model"
            )

    def _unknown_scales(self) -> Iterator[str]:
        """No fingerprint was noted, but the checkpoint's scales are in the profile themselves."""
        known: list[str] = []
        strange: list[str] = []
        for name, scale in self.weight_scales.items():
            rows = self._entries[name].output_scale
            if rows is not None and scale.numel() == len(rows):
                one = (scale.float().flatten() * rows - 1).abs().max().item()
                (known if one < _SAME else strange).append(name)
        if len(strange) > len(known):
            layers = len(known) + len(strange)
            yield (
                f"{len(strange)} of {layers} layers have other weight scales than it was made "
                f"with, first {strange[0]}"
            )

    def _misfits_of_layers(self) -> Iterator[str]:
        forms = self._forms
        for name, (_, dtype) in forms.items():
            is_layer = dtype == torch.int8 and f"{name}_scale" in forms
            if is_layer and name not in self._entries:
                yield f"{name} has no entry"
        for name, entry in self._entries.items():
            if name not in forms:
                yield f"{name} is in no layer of the checkpoint"
            else:
                yield from self._misfits_of(name, entry)

    def _misfits_of(self, name: str, entry: Entry) -> Iterator[str]:
        shape, dtype = self._forms[name]
        makes_codes = entry.kind == torch.int8 and name not in self._kept
        if (dtype == torch.int8) != makes_codes:
            yield f"{name} is {dtype} in the checkpoint, and {entry.kind} by the profile"
            return
        wanted = entry.shape
        if len(shape) != len(wanted) or any(
            w not in (None, s) for s, w in zip(shape, wanted, strict=True)
        ):
            yield f"{name} has shape {shape}, and {wanted} by the profile"
        if makes_codes:
            scale = self.weight_scales.get(name)
            many = shape[0] if entry.held is None else entry.held.numel()
            if scale is None or scale.numel() != many:
                of = "rows" if entry.held is None else "groups"
                yield f"{name} has no weight scale for each of its {many} {of}"
            elif not (scale.isfinite() & (scale > 0)).all():
                yield f"{name} has weight scales that are not finite and positive"
            elif self._is_of_others(entry, scale):
                yield f"{name} has other weight scales than the profile was made with"

    def _is_of_others(self, entry: Entry, scale: Tensor) -> bool:
        """Whether a checkpoint of codes has other scales than the profile says."""
        if self._starts_on_floats or entry.weight_scale is None:
            return False
        return not torch.equal(entry.weight_scale, scale.float().flatten())


def _likeness(weight: Tensor, entry: Entry) -> float:
    """How the maxima of the smoothed rows go with those that were calibrated.

    `output_scale` counts in calibrated scales, so that the maxima would be 127 everywhere;
    what is compared is the pattern before that.
    """
    rows = entry.weight_scale
    if rows is None or weight.dim() != 2 or weight.shape[0] != len(rows) or len(rows) < 2:
        return 1.0  # of another shape; that is reported elsewhere
    found = [
        row_absmax(scaled(weight[part], entry.input_scale, None)) for part in row_chunks(weight)
    ]
    smoothing: Tensor | float = 1.0
    if entry.output_scale is not None:
        smoothing = entry.output_scale if entry.held is not None else entry.output_scale * rows
    pair = torch.stack([torch.cat(found).flatten() * smoothing, rows]).clamp_min(1e-30).log()
    return float(torch.corrcoef(pair)[0, 1])
