"""The factors that another tool has chosen, read off a bf16 model and its W8A8 checkpoint.

Of each layer both are known, so the numbers that lead from one to the other are, too:

    codes  =  rows * (W / scale) * columns  +  rounding

Counted in codes, rounding is as large everywhere. Columns and rows follow by least squares; a norm
that was divided says so itself, and to the bit. A layer's columns then belong to the norm whose
factors they are, or to the rows of a layer before it. No name is looked at but to stay within a
block. Where what was found on one side has no other side, the two are no twins, or were made in a
way that is not understood: refused.
"""

from __future__ import annotations

import re
from collections import defaultdict
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Final

import torch
from torch import Tensor

from flashquant.errors import ProfileError
from flashquant.profiles.making.factors import Factors

_BLOCK: Final = re.compile(r"^.*?\.\d+\.")
_BIAS: Final = ".bias"  # goes the way of its weight
# Of log2, in the middle of the channels: a factor that is none; one that is another's.
_NONE: Final = 0.03
_SAME: Final = 0.05
_BF16: Final = 0.02  # of log2: no more than bf16 rounds
_MOST_ROUNDING: Final = 0.2  # of a layer's norm; int8 has about 0.01, GPTQ somewhat more
_AS_GOOD: Final = 1.25  # times the rounding that is left by factors of the layer's own
_FITS: Final = 3  # rounds of least squares


@dataclass
class _Layer:
    """What leads from one weight to its twin."""

    name: str
    weight: Tensor  # [N, K] float32, counted in the twin's scales
    twin: Tensor  # [N, K] float32, its codes
    columns: Tensor  # [K]
    rows: Tensor  # [N]
    least: float = 0.0  # what is left over by factors of its own

    def fit_rows(self) -> None:
        moved = self.weight * self.columns
        self.rows = _ratio((moved * self.twin).sum(1), moved.square().sum(1))

    def fit_columns(self) -> None:
        moved = self.weight * self.rows.unsqueeze(1)
        self.columns = _ratio((moved * self.twin).sum(0), moved.square().sum(0))

    def rounding(self, columns: Tensor, rows: Tensor) -> float:
        off = self.twin - self.weight * rows.unsqueeze(1) * columns
        return float(off.norm() / self.twin.norm().clamp_min(1e-30))


@dataclass(frozen=True)
class _Vector:
    """A norm that was divided: by what, `[K]`."""

    name: str
    by: Tensor
    known: Tensor  # [K] bool; a norm that is zero does not say by what it was divided
    offset: float


def factors_of_twins(
    weights: Mapping[str, Tensor], twin: Mapping[str, Tensor]
) -> tuple[Factors, dict[str, Tensor]]:
    """What a bf16 model was smoothed by before its twin was quantized.

    Args:
        weights: the bf16 checkpoint.
        twin: the W8A8 checkpoint: int8 codes `[N, K]`, and `NAME_scale` `[N, 1]`.

    Returns:
        The factors, and the scales `[N]` of each layer that is stored as codes.

    Raises:
        ProfileError: the two are no twins, or it is not seen how they became so.

    """
    scales = {
        name: twin[f"{name}_scale"].float().flatten()
        for name in twin
        if f"{name}_scale" in twin and twin[name].dtype == torch.int8
    }
    if not scales:
        raise ProfileError("the twin holds no int8 codes; it should be a W8A8 checkpoint")
    _check_same_names(weights, twin)
    blocks: dict[str, list[str]] = defaultdict(list)
    for name in weights:
        found = _BLOCK.match(name)
        blocks[found[0] if found else ""].append(name)
    factors = Factors()
    for names in blocks.values():
        layers = [_fitted(n, weights[n], twin[n], scales[n]) for n in names if n in scales]
        norms = [v for n in names if n not in scales for v in _divided(n, weights[n], twin[n])]
        _match_norms(layers, norms, factors)
        _match_layers(layers, factors)
        _add_biases(names, weights, factors)
        _check_all_is_explained(norms, layers, factors)
    return factors, scales


def _check_same_names(weights: Mapping[str, Tensor], twin: Mapping[str, Tensor]) -> None:
    shapes = {name: weights[name].shape for name in weights}
    ours = {name for name in twin if not name.endswith("_scale")}
    if odd := sorted(shapes.keys() ^ ours):
        raise ProfileError(
            f"{odd[0]} is only in one of the two ({len(odd)} such names); a twin has the same"
        )
    for name, shape in shapes.items():
        if twin[name].shape != shape:
            raise ProfileError(f"{name} is {list(shape)}, and {list(twin[name].shape)} in the twin")


def _fitted(name: str, weight: Tensor, codes: Tensor, scale: Tensor) -> _Layer:
    counted = weight / scale.unsqueeze(1)
    columns, rows = (torch.ones(size, device="cpu") for size in reversed(counted.shape))
    layer = _Layer(name, counted, codes.float(), columns, rows)
    for _ in range(_FITS):
        layer.fit_columns()
        layer.fit_rows()
    layer.least = layer.rounding(layer.columns, layer.rows)
    if layer.least > _MOST_ROUNDING:
        raise ProfileError(
            f"{name} is no factor of rows and of columns away from its twin ({layer.least:.0%} is "
            "left over), so they are not of the same model"
        )
    return layer


def _divided(name: str, vector: Tensor, twin: Tensor) -> Iterator[_Vector]:
    """A one-dimensional tensor that the twin has in other values: times what, by either reading."""
    if vector.dim() != 1 or torch.equal(vector, twin):
        return
    for offset in (0.0, 1.0):
        over, under = vector.float() + offset, twin.float() + offset
        yield _Vector(name, _ratio(over, under), (over != 0) & (under != 0), offset)


def _match_norms(layers: list[_Layer], norms: list[_Vector], factors: Factors) -> None:
    """Columns are those of the norm before, which knows them to the bit."""
    for layer in layers:
        fitting = [
            norm
            for norm in norms
            if len(norm.by) == len(layer.columns) and not norm.name.endswith(_BIAS)
        ]
        if _is_none(layer.columns):
            layer.columns = torch.ones_like(layer.columns)
            layer.fit_rows()
            continue
        if not fitting:
            continue
        norm = min(fitting, key=lambda norm: _apart(norm.by, layer.columns))
        if _apart(norm.by, layer.columns) > _SAME:
            continue
        by = norm.by
        if not norm.known.all():
            own = layer.columns * _shared(by[norm.known], layer.columns[norm.known])
            by = 1 / factors.rows.get(norm.name, 1 / torch.where(norm.known, by, own))
        layer.columns = factors.columns[layer.name] = by
        factors.rows[norm.name] = 1 / by
        if norm.offset:
            factors.offsets[norm.name] = norm.offset
        layer.fit_rows()


def _match_layers(layers: list[_Layer], factors: Factors) -> None:
    """Columns that no norm explains are the inverse of rows of another layer."""
    for layer in layers:
        width = len(layer.columns)
        if layer.name in factors.columns or _is_none(layer.columns):
            continue
        parts = [
            (maker, slice(start, start + width))
            for maker in layers
            if maker is not layer and len(maker.rows) % width == 0
            for start in range(0, len(maker.rows), width)
        ]
        if not parts:
            raise _unexplained(layer)
        maker, part = min(parts, key=lambda p: _apart(1 / p[0].rows[p[1]], layer.columns))
        if _apart(1 / maker.rows[part], layer.columns) > _SAME:
            raise _unexplained(layer)
        rows = _agreed(maker, part, layer)
        shared = factors.rows.setdefault(maker.name, torch.ones(len(maker.rows), device="cpu"))
        shared[part] = rows
        factors.columns[layer.name] = 1 / rows
        layer.columns = 1 / rows
        layer.fit_rows()


def _agreed(maker: _Layer, part: slice, layer: _Layer) -> Tensor:
    """`[K]`: the rows of one layer by which the columns of another are made up for.

    Both sides were measured through rounding; how well is told by the squares of their codes.
    """
    known, also = maker.twin[part].square().sum(1), layer.twin.square().sum(0)
    rows = maker.rows[part]
    columns = layer.columns * _shared((1 / rows)[known > 0], layer.columns[known > 0])
    log = rows.log() * known - columns.log() * also
    return torch.exp(log / (known + also).clamp_min(1))


def _add_biases(names: list[str], weights: Mapping[str, Tensor], factors: Factors) -> None:
    """They go with their weights."""
    for name in names:
        bias = f"{name.removesuffix('.weight')}{_BIAS}"
        if name in factors.rows and name.endswith(".weight") and bias in weights:
            factors.rows[bias] = factors.rows[name]


def _check_all_is_explained(norms: list[_Vector], layers: list[_Layer], factors: Factors) -> None:
    """What was divided is multiplied, in every channel; no factor was overlooked."""
    for norm in norms:
        if norm.name not in factors.rows and float(norm.by.log2().abs().max()) > _BF16:
            raise ProfileError(
                f"{norm.name} is another one in the twin, and no layer makes up for it; the twin "
                "is of another model, or smoothed in a way that is not understood"
            )
    for layer in layers:
        columns = factors.columns.get(layer.name, torch.ones_like(layer.columns))
        rows = factors.rows.get(layer.name, torch.ones_like(layer.rows))
        left = layer.rounding(columns, rows)
        if left > _AS_GOOD * layer.least + 2e-3:
            raise ProfileError(
                f"rows or columns of {layer.name} are scaled in the twin ({left:.1%} is left over "
                f"without, {layer.least:.1%} with factors of its own), and no norm and no other "
                "layer makes up for it"
            )


def _unexplained(layer: _Layer) -> ProfileError:
    return ProfileError(
        f"the columns of {layer.name} are scaled in the twin, and neither a norm nor a layer "
        "of its block is divided by the same; the twin is smoothed in a way that is not understood"
    )


def _ratio(over: Tensor, under: Tensor) -> Tensor:
    """Positive and finite; 1 where there is nothing to divide: dead channels, zero norms."""
    ratio = over / under
    return torch.where(ratio.isfinite() & (ratio > 0), ratio, 1.0)


def _shared(one: Tensor, other: Tensor) -> float:
    """What the first is times the second, in the middle channel.

    Rows and columns that share a factor the other way round are the same factors.
    """
    return float((one / other).log().median().exp())


def _is_none(factors: Tensor) -> bool:
    """Whether hardly any of them is anything but what all share."""
    return _apart(factors, torch.ones_like(factors)) < _NONE


def _apart(one: Tensor, other: Tensor) -> float:
    """How far the middle channel is from what all share, in powers of two."""
    return float((one / (other * _shared(one, other))).log2().abs().median())
