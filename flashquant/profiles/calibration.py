"""A profile at work on one engine: its vectors, and the scales of the checkpoint it fits.

The engine starts on the W8A8 checkpoint that the profile was made with, and takes its codes,
scales and norms as they are. Or it starts on floats, which are stored like every later push,
if the profile knows the weight scales. What passes by is noted: the weight scales, which give
the codes of every later push their meaning, and enough to tell whether profile and checkpoint
belong together.

Limits
    1. Codes that are pushed later are refused: of the norms beside them nobody could tell
       whether they have been smoothed already. A trainer pushes floats.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterable, Iterator
from collections.abc import Set as AbstractSet
from dataclasses import dataclass, field
from typing import Final, Literal, NamedTuple

import torch
from torch import Tensor

from flashquant.errors import MisfitTensor, ProfileError
from flashquant.profiles.profile import Entry, Profile, fingerprint
from flashquant.profiles.pruning import Pruning, Undo
from flashquant.schemes import (
    Doubts,
    check_finite,
    int8_frozen,
    int8_refreshed,
    row_absmax,
    row_chunks,
    scaled,
    scaled_norm,
)

Scales = Literal["frozen", "refreshed"]

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
    calibration = Calibration(profile, scales="frozen", device=torch.device("cpu"))
    for name, tensor in weights:
        calibration.note(name, tensor)
    calibration.check_fit()


@dataclass
class _Seen:
    """What the checkpoint held."""

    forms: dict[str, tuple[tuple[int, ...], torch.dtype]] = field(default_factory=dict)
    weight_scales: dict[str, Tensor] = field(default_factory=dict)  # by the name of the weight
    fingerprints: dict[str, str] = field(default_factory=dict)
    alike: dict[str, float] = field(default_factory=dict)  # of floats: to what was calibrated


class Clipping(NamedTuple):
    """How well frozen scales hold one weight, as scalars on its device.

    Attributes:
        outside: how many of its elements were clipped by a code or more.
        peak: max |w| / (127 * scale); about 1 where they fit.

    """

    outside: Tensor
    peak: Tensor


class Calibration:
    """Stores pushed weights the way a profile says.

    What it knows is on the host: an engine that sleeps may give up all of its device's memory.

    Attributes:
        clipping: of each weight as it was last pushed; only of frozen scales.
        warn_above: the fraction of a weight that may be clipped before somebody is told.

    Args:
        profile: as it was read.
        scales: `frozen` keeps the weight scales of the checkpoint, as FlashRL does; `refreshed`
            makes each anew from its channel at every push, and keeps only the smoothing.
        device: of the engine, where its vectors are wanted.
        starts_on_floats: the checkpoint is none of codes.
        warn_above: the fraction of a weight that may be clipped before somebody is told.
        prunes: silence channels that nobody reads any more, as FlashRL's `int8_prune`.

    """

    def __init__(
        self,
        profile: Profile,
        *,
        scales: Scales,
        device: torch.device,
        starts_on_floats: bool = False,
        warn_above: float = 1.0,
        prunes: bool = False,
    ) -> None:
        self.clipping: dict[str, Clipping] = {}
        self.starts_on_floats = starts_on_floats
        self.warn_above = warn_above
        self._profile, self._scales, self._device = profile, scales, device
        self._entries = {name: profile.entries[name] for name in profile.entries}
        self._there: dict[tuple[str, torch.device], Entry] = {}
        self._worth: dict[tuple[str, torch.device], Tensor] = {}
        self._fingerprinted = frozenset(profile.base.fingerprint) if profile.base else frozenset()
        self._seen = _Seen()
        self._pruning = Pruning(self._entries) if prunes else None

    def __contains__(self, name: str) -> bool:
        """Whether the profile speaks of this tensor, or of the weight whose scales it is."""
        return name in self._entries or name.removesuffix("_scale") in self._entries

    def note(self, name: str, tensor: Tensor) -> None:
        """The checkpoint that the engine starts on holds this tensor."""
        if self.starts_on_floats:
            entry = self._entries.get(name)
            if entry is not None and entry.weight_scale is not None:
                self._seen.alike[name] = _likeness(tensor, entry.to(tensor.device))
            return
        if name in self._fingerprinted:
            self._seen.fingerprints[name] = fingerprint(tensor)
        self.note_stored(name, tensor)

    def note_stored(self, name: str, tensor: Tensor) -> None:
        """The engine starts with this tensor, read so or made of floats."""
        self._seen.forms[name] = (tuple(tensor.shape), tensor.dtype)
        weight = name.removesuffix("_scale")
        if weight != name and weight in self._entries:
            # A copy: loaders hand out views of files and of buffers.
            self._seen.weight_scales[weight] = tensor.detach().clone().cpu()
        if self._pruning is not None and tensor.is_floating_point():
            # The checkpoint is served as it is, but its norms may be silenced by later codes.
            self._pruning.norm(name, tensor.detach().to(self._device))

    def check_fit(self) -> None:
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

    def stored(
        self,
        name: str,
        tensor: Tensor,
        into: Tensor | None = None,
        doubts: Doubts | None = None,
    ) -> Iterator[tuple[str, Tensor]]:
        """Yield a pushed tensor as the engine stores it, codes together with their scales.

        Args:
            name: as the trainer sends it.
            tensor: floats.
            into: where its codes are to be written; new memory if not given.
            doubts: takes what a device would have to be waited for.

        Raises:
            MisfitTensor: it is codes, or their scales; or holds values that are not finite.

        """
        if name not in self._entries or not tensor.is_floating_point() or tensor.itemsize == 1:
            raise MisfitTensor(
                f"{name} is quantized already ({tensor.dtype}), but this engine quantizes by the "
                f"profile {self._profile.source}. Push the weights as the trainer has them, in "
                "bfloat16, float16 or float32."
            )
        entry = self._vectors(name, tensor.device)
        columns, rows = entry.input_scale, entry.output_scale
        if entry.kind != torch.int8:
            stored = scaled_norm(tensor, columns, entry.offset).to(entry.kind)
            yield name, stored if self._pruning is None else self._pruning.norm(name, stored)
            return
        scale = self._weight_scale(name, tensor.device)
        if self._scales == "frozen":
            frozen = int8_frozen(tensor, columns, rows, into)
            check_finite(name, frozen.peak, (), doubts)  # codes of NaN would be zeros
            self.clipping[name] = Clipping(frozen.clipped, frozen.peak)
            codes = frozen.codes
        else:
            codes, scale = int8_refreshed(tensor, columns, rows, scale, into)
        yield name, codes
        yield f"{name}_scale", scale
        if self._pruning is not None and (norm := self._pruning.codes(name, codes)):
            yield norm

    def quantizers(self) -> Iterator[Callable[[Tensor], object]]:
        """Each way in which weights go through this profile, with factors of one, as a function
        of rows: what is compiled for it is what a push will launch."""
        factors = {
            (entry.input_scale is not None, entry.output_scale is not None)
            for entry in self._entries.values()
            if entry.kind == torch.int8
        }
        for has_input, has_output in sorted(factors):
            yield functools.partial(
                _through_ones, self._scales, has_input=has_input, has_output=has_output
            )

    def forget_device(self) -> None:
        """Whatever is kept on a device is about to be lost, the weights among it.

        Vectors are brought there again when they are wanted; what was read off the weights is
        read off the next ones.
        """
        self._there.clear()
        self._worth.clear()
        self.clipping.clear()
        if self._pruning is not None:
            self._pruning.forget()

    def remember(self, undo: Undo) -> None:
        """Let an undo log put back what pushes change here."""
        if self._pruning is not None:
            self._pruning.remember(undo)

    def begin_anew(self, come: AbstractSet[str] = frozenset()) -> None:
        """Another sync has begun, and these tensors have come with it."""
        if self._pruning is not None:
            self._pruning.begin_anew(come)

    def _vectors(self, name: str, device: torch.device) -> Entry:
        """Where the pushed tensor is: a trainer may push from the host."""
        key = name, device
        if key not in self._there:
            self._there[key] = self._entries[name].to(device)
        return self._there[key]

    def _weight_scale(self, name: str, device: torch.device) -> Tensor:
        """`[N, 1]`: that of the checkpoint, or of the profile where there is no other."""
        key = name, device
        if key not in self._worth:
            worth = self._entries[name].weight_scale
            if worth is None or not self.starts_on_floats:
                known = self._seen.weight_scales[name]
            else:
                known = worth.unsqueeze(1)
            self._worth[key] = known.to(device)
        return self._worth[key]

    def _misfits_of_checkpoint(self) -> Iterator[str]:
        if not self._seen.forms:
            yield "no weight of a checkpoint was loaded"
        if self.starts_on_floats:
            yield from self._strange_floats()
            return
        base = self._profile.base
        for name, wanted in (base.fingerprint if base else {}).items():
            found = self._seen.fingerprints.get(name)
            if found != wanted:
                has = "has no such tensor" if found is None else f"holds {found[:12]} there"
                yield f"{name} should be {wanted[:12]} (sha256), but the checkpoint {has}"
        if not self._fingerprinted and self._seen.forms:
            yield from self._unknown_scales()

    def _strange_floats(self) -> Iterator[str]:
        """A trained policy has other bits than what was calibrated, but the same large rows."""
        strange = [name for name, alike in self._seen.alike.items() if alike < _ALIKE]
        if 2 * len(strange) > len(self._seen.alike):
            yield (
                f"the rows of {len(strange)} of {len(self._seen.alike)} layers have other maxima "
                f"than those that were calibrated (correlation {self._seen.alike[strange[0]]:.2f} "
                f"in {strange[0]}), so it is another model"
            )

    def _unknown_scales(self) -> Iterator[str]:
        """Nobody noted a fingerprint, but the checkpoint's scales are in the profile themselves."""
        known: list[str] = []
        strange: list[str] = []
        for name, scale in self._seen.weight_scales.items():
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
        forms = self._seen.forms
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
        shape, dtype = self._seen.forms[name]
        if (dtype == torch.int8) != (entry.kind == torch.int8):
            yield f"{name} is {dtype} in the checkpoint, and {entry.kind} by the profile"
            return
        wanted = entry.shape
        if len(shape) != len(wanted) or any(
            w not in (None, s) for s, w in zip(shape, wanted, strict=True)
        ):
            yield f"{name} has shape {shape}, and {wanted} by the profile"
        if entry.kind == torch.int8:
            scale = self._seen.weight_scales.get(name)
            if scale is None or scale.numel() != shape[0]:
                yield f"{name} has no weight scale for each of its {shape[0]} rows"
            elif not (scale.isfinite() & (scale > 0)).all():
                yield f"{name} has weight scales that are not finite and positive"
            elif self._is_of_others(entry, scale):
                yield f"{name} has other weight scales than the profile was made with"

    def _is_of_others(self, entry: Entry, scale: Tensor) -> bool:
        """Whether a checkpoint of codes has other scales than the profile says."""
        if self.starts_on_floats or entry.weight_scale is None:
            return False
        return not torch.equal(entry.weight_scale, scale.float().flatten())


def _through_ones(scales: Scales, weight: Tensor, *, has_input: bool, has_output: bool) -> None:
    """Quantize rows by factors of one, those that there are."""
    rows, columns = (weight.new_ones(size, dtype=torch.float32) for size in weight.shape)
    factors = (columns if has_input else None, rows if has_output else None)
    if scales == "frozen":
        int8_frozen(weight, *factors)
    else:
        int8_refreshed(weight, *factors, rows.unsqueeze(1))


def _likeness(weight: Tensor, entry: Entry) -> float:
    """How the maxima of the smoothed rows go with those that were calibrated.

    `output_scale` counts in calibrated scales, so that the maxima would be 127 everywhere;
    what is compared is the pattern before that.
    """
    rows = entry.weight_scale
    if rows is None or weight.dim() != 2 or weight.shape[0] != len(rows) or len(rows) < 2:
        return 1.0  # of another shape; that is told elsewhere
    found = [
        row_absmax(scaled(weight[part], entry.input_scale, None)) for part in row_chunks(weight)
    ]
    smoothing = 1.0 if entry.output_scale is None else entry.output_scale * rows
    pair = torch.stack([torch.cat(found).flatten() * smoothing, rows]).clamp_min(1e-30).log()
    return float(torch.corrcoef(pair)[0, 1])
