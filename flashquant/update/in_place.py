"""A tensor that lands, all of it, in live memory: taken in one call, on the host in C.

Inside a bracket there is nothing to decide about such a tensor that was not decided when it last
came: where its rows go, and its scales, what makes them, which layer they may complete. So all of
that is bound, and the tensor is looked at, stored and noted. What does not fit (another dtype,
another device, a name that comes twice) takes the general path, which refuses it by name, or
takes it; the bits are the same.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Final, NamedTuple

import torch
from torch import Tensor

from flashquant.plan import View
from flashquant.schemes import Storing, check_peak, storing
from flashquant.update.code_statistics import Noted, noted_in_place
from flashquant.update.engine import Layer
from flashquant.update.quantize import Recipe
from flashquant.update.staging import Stage
from flashquant.update.state import Update

_PLAIN: Final = (Tensor, torch.nn.Parameter)  # subclasses may watch what is done to them


class Window(NamedTuple):
    """Live memory that takes all of a stored tensor: codes, scales, or the tensor itself.

    Attributes:
        target: the parameter that it is a part of.
        live: the memory.

    """

    target: str
    layer: Layer
    stage: Stage
    view: View
    live: Tensor


@dataclass(frozen=True)
class InPlaceWrite:
    """One name of the trainer's, and everything that its tensor will cause, bound.

    Attributes:
        names: its own, and that of the scales that are made of it.
        shape, dtype, device: of the tensors that fit.
        nbytes: of each.
        windows: of codes and scales, or of the tensor itself.
        layer: which all of them lie in.
        store: fills them.
        noted: of the codes, for the report; None where there are none.

    """

    names: tuple[str, ...]
    shape: torch.Size
    dtype: torch.dtype
    device: torch.device
    nbytes: int
    windows: tuple[Window, ...]
    targets: tuple[str, ...]
    layer: Layer
    store: Storing
    noted: Noted | None

    def take(self, sent: object, update: Update) -> bool:
        """Store a tensor where it belongs, and note it; False if it needs the general path.

        Raises:
            MisfitTensor: it holds NaN or infinite values. They are live, until the update is
                rolled back.

        """
        name, layer, undo = self.names[0], self.layer, update.undo
        if name in update.names or not self._fits(sent):
            return False
        for target, _, stage, view, _ in self.windows:
            update.claim(stage, view)
            if not layer.move_in(target, undo):
                return False
        told = self.store(sent)  # type: ignore[arg-type]  # it fits
        if isinstance(told, Tensor):
            update.doubts.add(name, told, ())
        else:
            check_peak(name, told, ())
        for _, _, stage, view, _ in self.windows:
            stage.arrived(view)
        update.waiting[layer.name] = layer
        update.arrived.update(self.targets)
        update.names.update(self.names)
        update.statistics.read(self.nbytes)
        if self.noted is not None:
            update.statistics.noted[name] = self.noted
        return True

    def _fits(self, sent: object) -> bool:
        return (
            type(sent) in _PLAIN
            and sent.dtype is self.dtype  # type: ignore[attr-defined]  # it is a tensor
            and sent.shape == self.shape  # type: ignore[attr-defined]
            and sent.device == self.device  # type: ignore[attr-defined]
            and sent.layout is torch.strided  # type: ignore[attr-defined]
            and sent.is_contiguous()  # type: ignore[attr-defined]
            and not sent.is_neg()  # type: ignore[attr-defined]
        )

    @property
    def phase(self) -> str:
        """What its time is spent on, in the words of a report."""
        return "write" if self.noted is None else "quantize"

    @property
    def completes(self) -> bool:
        """Whether nothing is missing any more of the parameters that it is a part of."""
        first, *others = self.windows
        return first.stage.complete and all(window.stage.complete for window in others)


def in_place_write(
    names: tuple[str, ...], recipe: Recipe, tensor: Tensor, windows: Sequence[Window]
) -> InPlaceWrite | None:
    """What takes tensors like this one in one call; None where the live memory does not fit.

    Args:
        names: its own, and where codes are made of it, that of its scales.
        recipe: how it is stored.
        tensor: one that has been taken.
        windows: one for each name.

    """
    makes_codes, live = len(names) > 1, windows[0].live
    if live.device != tensor.device or not (makes_codes or live.dtype == tensor.dtype):
        return None
    rows = [w.live.view(len(w.live) if w.live.dim() > 1 else 1, -1) for w in windows]
    return InPlaceWrite(
        names=names,
        shape=tensor.shape,
        dtype=tensor.dtype,
        device=tensor.device,
        nbytes=tensor.nbytes,
        windows=tuple(windows),
        targets=tuple(window.target for window in windows),
        layer=windows[0].layer,
        store=_as_loaded(recipe, tensor.dtype, *rows)
        if makes_codes
        else storing(None, tensor.dtype, *rows),
        noted=noted_in_place(live) if makes_codes else None,
    )


def _as_loaded(recipe: Recipe, dtype: torch.dtype, *rows: Tensor) -> Storing:
    """What stores codes of such a tensor, by way of what the engine's loader would hold of it."""
    loads = recipe.loads or dtype
    store = storing(recipe.quantize, loads, *rows)
    return store if loads == dtype else lambda weight: store(weight.to(loads))
