"""What is multiplied by what, and the profile that says so.

weight of a linear layer   (W * rows) * columns     rows [N], columns [K]
norm, bias                 (v + offset) * factor - offset
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from types import MappingProxyType

import torch
from torch import Tensor

from flashquant.errors import ProfileError
from flashquant.profiles import Base, Entry, Profile
from flashquant.profiles.profile import KINDS
from flashquant.schemes import row_absmax, scaled


@dataclass(frozen=True)
class Producer:
    """Entries `start` to `stop` of the first dimension of a tensor: rows, or a part of a vector.

    Attributes:
        offset: what the model adds to a norm before it multiplies by it; 1 in Gemma.

    """

    name: str
    start: int
    stop: int
    offset: float = 0.0


@dataclass(frozen=True)
class Site:
    """Where K channels of activations may be divided: by whom, and who has to make up for it."""

    producers: tuple[Producer, ...]
    consumers: tuple[str, ...]  # weights [N, K] of linear layers

    @property
    def channels(self) -> int:
        return self.producers[0].stop - self.producers[0].start


@dataclass(frozen=True)
class Factors:
    """By what each tensor is multiplied; those that are not named, by 1.

    Attributes:
        columns: of the weights of linear layers, `[K]` float32.
        rows: of weights `[N, K]` and of vectors `[N]`, float32.
        offsets: of norms, where not 0.

    """

    columns: dict[str, Tensor] = field(default_factory=dict)
    rows: dict[str, Tensor] = field(default_factory=dict)
    offsets: dict[str, float] = field(default_factory=dict)

    def smooth(self, site: Site, by: Tensor, lengths: Mapping[str, int]) -> None:
        """Divide the channels of a site by `[K]` numbers.

        Args:
            site: whose producers are divided, and whose consumers are multiplied.
            by: finite and positive, float32.
            lengths: of the first dimension of each producer.

        """
        for consumer in site.consumers:
            self.columns[consumer] = self.columns.get(consumer, torch.ones_like(by)) * by
        for producer in site.producers:
            rows = self.rows.setdefault(
                producer.name, torch.ones(lengths[producer.name], device="cpu")
            )
            rows[producer.start : producer.stop] /= by
            if producer.offset:
                self.offsets[producer.name] = producer.offset


def profile_of(
    factors: Factors,
    weights: Iterable[tuple[str, Tensor]],
    layers: Mapping[str, Tensor | None],
    source: str,
    base: Base | None = None,
    *,
    scheme: str = "int8",
    held: Mapping[str, Tensor] = MappingProxyType({}),
) -> Profile:
    """A profile of a model under these factors.

    Args:
        factors: by name.
        weights: the bf16 checkpoint.
        layers: the weights to be stored as codes, and the scales `[N]` of those that have some;
            None for a scale of the row's own: absmax / 127 after smoothing.
        source: for errors.
        base: of which checkpoint it is.
        scheme: that it is for.
        held: of each layer, for int4: `[N, groups]`, hundredths of what its codes reach.

    Raises:
        ProfileError: a layer is not in the checkpoint.

    """
    entries: dict[str, Entry] = {}
    missing = set(layers)
    for name, tensor in weights:
        rows = factors.rows.get(name)
        if name in layers:
            missing.discard(name)
            columns = factors.columns.get(name)
            scale = layers[name]
            if scale is None:
                peak = row_absmax(scaled(tensor, columns, rows)).flatten()
                scale = torch.where(peak == 0, 1.0, peak) / torch.tensor(127.0, device=peak.device)
            counted = 1 / scale if rows is None else rows / scale
            if name in held:
                entries[name] = Entry(torch.int8, columns, rows, scale, held=held[name])
            else:
                entries[name] = Entry(torch.int8, columns, counted, scale)
        elif rows is not None:
            if tensor.dtype not in KINDS.values():
                raise ProfileError(f"{name} is {tensor.dtype}; known: {', '.join(KINDS)}")
            entries[name] = Entry(tensor.dtype, rows, None, None, factors.offsets.get(name, 0.0))
    if missing:
        raise ProfileError(
            f"{source} has no {min(missing)} ({len(missing)} such layers), so it is not the "
            "checkpoint of this model"
        )
    return Profile(entries, source, base, scheme)
