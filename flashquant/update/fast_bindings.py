"""The short way of a tensor that lands, all of it, in live memory: one call, on the host into C.

Inside a bracket there is nothing to decide about such a tensor that was not decided when it last
came: where its rows go, and its scales, what makes them, which layer they may complete. So all of
that is bound, and the tensor is looked at, stored and noted. It is a shorter way to the very same
end: whatever does not fit (another dtype, another device, a name that comes twice) is sent
the long way, which says what is wrong with it, or takes it.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Final, NamedTuple

import torch
from torch import Tensor

from flashquant.plan import View, Write
from flashquant.schemes import Storing, check_peak, storing
from flashquant.update.bindings import Landing, Way
from flashquant.update.code_statistics import Noted, noted_in_place
from flashquant.update.engine import Layer
from flashquant.update.quantize import Recipe, is_float
from flashquant.update.staging import Stage
from flashquant.update.state import Update

_PLAIN: Final = (Tensor, torch.nn.Parameter)  # nobody watches what is done to these


class Part(NamedTuple):
    """One window of live memory: of codes, of scales, or of a tensor that is stored as it comes."""

    target: str
    stage: Stage
    view: View
    live: Tensor


@dataclass(frozen=True)
class Shortcut:
    """One name of the trainer's, and everything that its tensor will cause, bound.

    Attributes:
        names: its own, and that of the scales that are made of it.
        shape, dtype, device: of the tensors that fit.
        nbytes: of each.
        parts: codes and scales, or the tensor itself.
        layer: which all of them lie in.
        store: fills them.
        noted: of the codes, for the report; None where there are none.

    """

    names: tuple[str, ...]
    shape: torch.Size
    dtype: torch.dtype
    device: torch.device
    nbytes: int
    parts: tuple[Part, ...]
    targets: tuple[str, ...]
    layer: Layer
    store: Storing
    noted: Noted | None

    def take(self, sent: object, update: Update) -> bool:
        """Store a tensor where it belongs, and note it; False if it has to go the long way.

        Raises:
            MisfitTensor: it holds NaN or infinite values. They are live, until the update is
                rolled back.

        """
        name, layer, undo = self.names[0], self.layer, update.undo
        if name in update.names or not self._fits(sent):
            return False
        for target, stage, view, _ in self.parts:
            update.claim(stage, view)
            if not layer.move_in(target, undo):
                return False
        peak = self.store(sent)  # type: ignore[arg-type]  # it fits
        if isinstance(peak, Tensor):
            update.doubts.add(name, peak, ())
        else:
            check_peak(name, peak, ())
        for _, stage, view, _ in self.parts:
            stage.arrived(view)
        update.waiting[layer.name] = layer
        update.arrived.update(self.targets)
        update.names.update(self.names)
        update.tensors += 1
        update.bytes_in += self.nbytes
        if self.noted is not None:
            update.noted[name] = self.noted
        return True

    def _fits(self, sent: object) -> bool:
        return (
            type(sent) in _PLAIN
            and sent.dtype is self.dtype  # type: ignore[attr-defined]  # it is a tensor
            and sent.shape == self.shape  # type: ignore[attr-defined]
            and sent.device == self.device  # type: ignore[attr-defined]
            and sent.layout is torch.strided  # type: ignore[attr-defined]
            and sent.is_contiguous()  # type: ignore[attr-defined]
        )

    @property
    def phase(self) -> str:
        """What its time is spent on, in the words of a report."""
        return "write" if self.noted is None else "quantize"

    @property
    def completes(self) -> bool:
        """Whether nothing is missing any more of the parameters that it is a part of."""
        first, *others = self.parts
        return first.stage.complete and all(part.stage.complete for part in others)


class Shortcuts:
    """Those of all names that have come the long way before, where there are any."""

    def __init__(self) -> None:
        self._known: dict[str, Shortcut] = {}
        self._learned: dict[str, torch.dtype] = {}

    def of(self, name: str) -> Shortcut | None:
        """The short way of a name."""
        return self._known.get(name)

    def learn(self, way: Way, tensor: Tensor) -> None:
        """A tensor has come the long way: see whether the next one of its dtype needs to."""
        if self._learned.get(way.name) is tensor.dtype:
            return
        self._learned[way.name] = tensor.dtype
        self._known.pop(way.name, None)
        if (found := _shortcut(way, tensor)) is not None:
            self._known[way.name] = found


def _shortcut(way: Way, tensor: Tensor) -> Shortcut | None:
    recipe = way.recipe
    if recipe.calibration is not None or not is_float(tensor):
        return None
    codes = way.landing_of_codes(tensor)
    names = (way.name,) if codes is None else (way.name, recipe.scale_name)
    parts = tuple(part for name in names for part in _parts(way.landings.get(name)))
    if len(parts) != len(names):
        return None
    live = parts[0].live
    if live.device != tensor.device or (codes is None and live.dtype != tensor.dtype):
        return None
    rows = (part.live.view(len(part.live) if part.live.dim() > 1 else 1, -1) for part in parts)
    ((_, layer, _),) = way.landings[way.name].steps
    return Shortcut(
        names=names,
        shape=tensor.shape,
        dtype=tensor.dtype,
        device=tensor.device,
        nbytes=tensor.nbytes,
        parts=parts,
        targets=tuple(part.target for part in parts),
        layer=layer,
        store=storing(None, tensor.dtype, *rows)
        if codes is None
        else _as_loaded(recipe, tensor.dtype, *rows),
        noted=None if codes is None else noted_in_place(live),
    )


def _as_loaded(recipe: Recipe, dtype: torch.dtype, *rows: Tensor) -> Storing:
    """What stores codes of such a tensor, by way of what the engine's loader would hold of it."""
    loads = recipe.loads or dtype
    store = storing(recipe.quantize, loads, *rows)
    return store if loads == dtype else lambda weight: store(weight.to(loads))


def _parts(landing: Landing | None) -> Iterator[Part]:
    """The one window that all of a tensor goes to, element by element, if it is so."""
    if landing is None or len(landing.steps) != 1:
        return
    ((step, layer, stage),) = landing.steps
    home = layer.homes.get(step.target)
    if home is None or not isinstance(step, Write):
        return
    source, view = step.source_view, step.target_view
    whole = source.offset == 0 and source.numel == landing.entry.numel
    if whole and source.is_dense and view.is_dense and view.numel:
        yield Part(step.target, stage, view, view.into(home))
