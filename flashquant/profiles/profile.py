"""The nouns: what a profile says of one weight, and of a whole model.

Dead channels: a factor is finite and positive, so a profile made by dividing by a norm
weight or a row that is all zeros (FlashRL's 0/0) is refused where it is read; whoever makes
one writes the neutral factor 1 there. Weights that are zero when they are pushed need no
care: a zero norm stays zero, the codes of a zero row or column are 0, and the refreshed
scale of a zero row is a 127th of the checkpoint's.
"""

from __future__ import annotations

import copy
import hashlib
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Final

import torch
from torch import Tensor

from flashquant.errors import ProfileError
from flashquant.profiles.header import Base

KINDS: Final[Mapping[str, torch.dtype]] = {
    "int8": torch.int8,
    "bfloat16": torch.bfloat16,
    "float16": torch.float16,
    "float32": torch.float32,
}
"""What a weight is stored as: codes, or the dtype of a norm."""

SIDES: Final = ("input_scale", "output_scale", "weight_scale")
"""The vectors of an entry."""

HELD: Final = "held"
"""Beside the vectors of an entry, of a layer in int4."""

_MOST_CHANNELS: Final = 1 << 22  # no layer has as many; a file that claims more is no profile


@dataclass(frozen=True)
class Entry:
    """How one weight is scaled before it is stored.

    Attributes:
        kind: int8 for a linear layer `[N, K]`, the stored dtype for a norm or a bias `[K]`.
        input_scale: float32, one number for each of the K columns; None means ones.
        output_scale: float32, one number for each of the N rows; None means ones.
        weight_scale: float32, one number for each of the N rows: what a code is worth. None where
            only the checkpoint knows (FlashRL's files).
        held: uint8 `[N, groups]`, of a layer in int4: how many hundredths of the absolute maximum
            of each group its codes reach. Then rows are scaled by `output_scale` as they are, and
            `weight_scale` only tells this model's rows from another's.
        offset: what the model adds to a norm before it multiplies by it; 1 in Gemma.

    Raises:
        ProfileError: a vector is not what it should be; says which, not of which weight.

    """

    kind: torch.dtype
    input_scale: Tensor | None
    output_scale: Tensor | None
    weight_scale: Tensor | None = None
    offset: float = 0.0
    held: Tensor | None = None

    def __post_init__(self) -> None:
        if self.kind not in KINDS.values():
            raise ProfileError(f"is stored as {self.kind}; known: {', '.join(KINDS)}")
        for side, vector in self.vectors.items():
            _check_vector(side, vector)
            if self.kind != torch.int8 and side != "input_scale":
                raise ProfileError(f"is a norm and has an {side}, but only the rows of codes do")
        if self.offset not in (0, 1) or (self.offset and self.kind == torch.int8):
            raise ProfileError(f"has an offset of {self.offset}; norms have 0 or 1, codes have 0")
        rows = (self.output_scale, self.weight_scale, self.held)
        if len({len(v) for v in rows if v is not None}) > 1:
            raise ProfileError(
                "has vectors of rows (output_scale, weight_scale, held) of different lengths"
            )
        if self.held is not None:
            _check_held(self.kind, self.held)

    @property
    def vectors(self) -> dict[str, Tensor]:
        """Those that are not ones, by the names of their fields."""
        sides = {side: getattr(self, side) for side in SIDES}
        return {side: vector for side, vector in sides.items() if vector is not None}

    @property
    def tensors(self) -> dict[str, Tensor]:
        """All that it holds, by the names of their fields."""
        return self.vectors if self.held is None else {**self.vectors, HELD: self.held}

    @property
    def shape(self) -> tuple[int | None, ...]:
        """Of the weight, as far as the entry knows it: None where any length would do."""
        columns = None if self.input_scale is None else len(self.input_scale)
        if self.kind != torch.int8:
            return (columns,)
        known = (self.output_scale, self.weight_scale, self.held)
        return (next((len(rows) for rows in known if rows is not None), None), columns)

    def to(self, device: torch.device) -> Entry:
        """The same entry with its vectors on a device."""
        there = copy.copy(self)
        # They have been looked at: doing it again would wait for the device.
        vars(there).update((side, vector.to(device)) for side, vector in self.tensors.items())
        return there


@dataclass(frozen=True)
class Profile:
    """What was calibrated for one model and one scheme.

    Attributes:
        entries: by the name of the weight in the checkpoint; ours are read as they are asked for.
        source: where it was read, for errors.
        base: of which checkpoint it says so; None where it was not noted (FlashRL's files).
        scheme: that it scales, by its canonical name.

    """

    entries: Mapping[str, Entry]
    source: str
    base: Base | None = None
    scheme: str = "int8"

    def knows_weight_scales(self) -> bool:
        """Whether floats can be quantized by it alone, without the W8A8 checkpoint."""
        if self.scheme != "int8":
            return True
        codes = [entry for entry in self.entries.values() if entry.kind == torch.int8]
        return bool(codes) and all(entry.weight_scale is not None for entry in codes)


def fingerprint(tensor: Tensor) -> str:
    """sha256 of what a tensor holds, whatever its shape and device."""
    flat = tensor.detach().cpu().contiguous().flatten().view(torch.uint8)
    return hashlib.sha256(flat.numpy().tobytes()).hexdigest()


def _check_held(kind: torch.dtype, held: Tensor) -> None:
    if kind != torch.int8 or held.dtype != torch.uint8 or held.dim() != 2 or not held.numel():
        raise ProfileError(
            f"has {HELD} of {held.dtype} {tuple(held.shape)}; it should be uint8 [N, groups], and "
            "only layers of codes have it"
        )
    if not held.all():
        raise ProfileError(f"has groups of which codes reach nothing ({HELD} of 0)")


def _check_vector(side: str, vector: Tensor) -> None:
    if vector.dtype != torch.float32 or vector.dim() != 1:
        shape = tuple(vector.shape)
        raise ProfileError(f"has an {side} of {vector.dtype} {shape}; it should be float32 [n]")
    if not 0 < len(vector) <= _MOST_CHANNELS:
        raise ProfileError(f"has an {side} of {len(vector)} channels; no layer has as many")
    odd = ~(vector.isfinite() & (vector > 0))
    if odd.any():
        index = int(odd.nonzero()[0])
        raise ProfileError(
            f"has an {side} with {int(odd.sum())} of {len(vector)} numbers that are not finite and "
            f"positive, first {vector[index].item()} at {index}"
        )
