"""A profile at work on one engine: its vectors, and the scales of the checkpoint it fits.

The engine starts on the W8A8 checkpoint that the profile was made with, and takes its codes,
scales and norms as they are. Or it starts on floats, which are stored like every later push,
if the profile knows the weight scales. What passes by is noted: the weight scales, which give
the codes of every later push their meaning, and enough to tell whether profile and checkpoint
belong together.

Limits
    1. Codes that are pushed later are refused: it could not be known of the norms beside them
       whether they have been smoothed already. A trainer pushes floats.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterator
from collections.abc import Set as AbstractSet
from typing import Literal, NamedTuple

import torch
from torch import Tensor

from flashquant.config.schemes import SCHEMES
from flashquant.errors import MisfitTensor
from flashquant.profiles.fit import Fit
from flashquant.profiles.profile import Entry, Profile
from flashquant.profiles.pruning import Pruning, Undo
from flashquant.schemes import (
    Doubts,
    check_finite,
    int4_refreshed,
    int8_frozen,
    int8_refreshed,
    scaled,
    scaled_norm,
)

Scales = Literal["frozen", "refreshed"]


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
        warn_above: the fraction of a weight that may be clipped before the log warns.

    Args:
        profile: as it was read.
        scales: `frozen` keeps the weight scales of the checkpoint, as FlashRL does; `refreshed`
            makes each anew from its channel at every push, and keeps only the smoothing.
        device: of the engine, where its vectors are wanted.
        starts_on_floats: the checkpoint is none of codes.
        warn_above: the fraction of a weight that may be clipped before the log warns.
        prunes: silence channels that no layer reads any more, as FlashRL's `int8_prune`.
        kept: names of weights that stay floats, and are scaled all the same: the norms in front of
            them are.

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
        kept: AbstractSet[str] = frozenset(),
    ) -> None:
        self.clipping: dict[str, Clipping] = {}
        self.starts_on_floats = starts_on_floats
        self.warn_above = warn_above
        self._profile, self._scales, self._device = profile, scales, device
        self._entries = {name: profile.entries[name] for name in profile.entries}
        self._there: dict[tuple[str, torch.device], Entry] = {}
        self._worth: dict[tuple[str, torch.device], Tensor] = {}
        self._kept = frozenset(name for name in kept if name in self._entries)
        self._fit = Fit(profile, starts_on_floats=starts_on_floats, kept=self._kept)
        self._group = SCHEMES[profile.scheme].group or -1  # of int4, which has groups
        self._pruning = Pruning(self._entries) if prunes else None

    def __contains__(self, name: str) -> bool:
        """Whether the profile speaks of this tensor, or of the weight whose scales it is."""
        return name in self._entries or name.removesuffix("_scale") in self._entries

    def note(self, name: str, tensor: Tensor) -> None:
        """The checkpoint that the engine starts on holds this tensor."""
        self._fit.note(name, tensor)
        if not self.starts_on_floats:
            self._note_norm(name, tensor)

    def note_stored(self, name: str, tensor: Tensor) -> None:
        """The engine starts with this tensor, made of floats."""
        self._fit.note_stored(name, tensor)
        self._note_norm(name, tensor)

    def _note_norm(self, name: str, tensor: Tensor) -> None:
        """The checkpoint is served as it is, but its norms may be silenced by later codes."""
        if self._pruning is not None and tensor.is_floating_point():
            self._pruning.norm(name, tensor.detach().to(self._device))

    def check_fit(self) -> None:
        """Raise ProfileError where the checkpoint that was noted is not the profile's."""
        self._fit.check()

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
        if entry.held is not None:
            yield from self._stored_in_groups(name, tensor, entry, entry.held, into)
            return
        scale = self._weight_scale(name, tensor.device)
        if name in self._kept:
            yield name, (scaled(tensor, columns, rows) * scale).to(tensor.dtype)
            return
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

    def _stored_in_groups(
        self, name: str, tensor: Tensor, entry: Entry, held: Tensor, into: Tensor | None
    ) -> Iterator[tuple[str, Tensor]]:
        columns, rows = entry.input_scale, entry.output_scale
        if name in self._kept:
            yield name, scaled(tensor, columns, rows).to(tensor.dtype)
            return
        codes, scale = int4_refreshed(tensor, columns, rows, held, into, group=self._group)
        yield name, codes
        yield f"{name}_scale", scale

    def quantizers(self) -> Iterator[Callable[[Tensor], object]]:
        """Each way in which weights go through this profile, with factors of one, as a function
        of rows: what is compiled for it is what a push will launch."""
        factors = {
            (entry.input_scale is not None, entry.output_scale is not None)
            for entry in self._entries.values()
            if entry.kind == torch.int8 and entry.held is None
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
                known = self._fit.weight_scales[name]
            else:
                known = worth.unsqueeze(1)
            self._worth[key] = known.to(device)
        return self._worth[key]


def _through_ones(scales: Scales, weight: Tensor, *, has_input: bool, has_output: bool) -> None:
    """Quantize rows by factors of one, those that there are."""
    rows, columns = (weight.new_ones(size, dtype=torch.float32) for size in weight.shape)
    factors = (columns if has_input else None, rows if has_output else None)
    if scales == "frozen":
        int8_frozen(weight, *factors)
    else:
        int8_refreshed(weight, *factors, rows.unsqueeze(1))
