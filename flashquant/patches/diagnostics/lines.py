"""An inspection in as few lines as tell it: what differs by the number of a block is one line.

model.layers.{0-29}.self_attn.k_proj.weight  ->  model.layers.{0-29}.self_attn.qkv_proj.weight
                                                 rows 576:768 of 960
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace

from flashquant.patches.diagnostics.inspected import (
    Destination,
    Form,
    InspectedLayer,
    InspectedTensor,
    Inspection,
)

_NUMBER = re.compile(r"(?<=\.)\d+(?=\.)")


@dataclass(frozen=True)
class Line:
    """One step of the plan of one tensor, or of several that differ in numbers only.

    Attributes:
        name: of the tensor.
        form: of the tensor.
        target: the parameter it lands in; empty where it does not.
        whole: dtype and shape of that.
        window: the part of it that is written, by dimension: `:` is all of one.
        span: where that part begins and ends, as fractions of the parameter's memory.
        kept_as: the dtype that kernels read.
        how: as `inspected.How`, or `padding`, `dropped`, `refused`.
        alike: how many tensors the line stands for.

    """

    name: str
    form: Form
    target: str = ""
    whole: Form | None = None
    window: str = ""
    span: tuple[float, float] = (0.0, 0.0)
    kept_as: str = ""
    how: str = ""
    alike: int = 1


def lines_of(inspection: Inspection, *, apart: bool = False) -> list[Line]:
    """The lines of a plan, in the order of the checkpoint; every tensor by itself if `apart`."""
    homes = {target: layer for layer in inspection.layers for target in layer.parameters}
    every = (line for tensor in inspection.tensors for line in _lines(tensor, homes))
    return list(every) if apart else _together(every)


def _lines(tensor: InspectedTensor, homes: Mapping[str, InspectedLayer]) -> Iterator[Line]:
    if not tensor.steps:
        yield Line(tensor.name, tensor.form, how="refused" if tensor.refused else "dropped")
    for step in tensor.steps:
        if 0 in step.shape:
            continue  # no padding is needed
        layer = homes[step.target]
        whole = layer.parameters[step.target]
        yield Line(
            name=tensor.name,
            form=tensor.form,
            target=step.target,
            whole=whole,
            window=_window(step, whole.shape),
            span=_span(step, whole.shape),
            kept_as=layer.kept_as(step.target),
            how="padding" if step.what == "fill" else layer.how,
        )


def _window(step: Destination, whole: Sequence[int]) -> str:
    """The part of a parameter that a step writes, as Python slices it, if it is a slice."""
    strides = _strides(whole)
    shape = (1,) * (len(whole) - len(step.shape)) + step.shape
    mine = (0,) * (len(whole) - len(step.shape)) + step.stride
    plain = all(n == 1 or own == s for n, own, s in zip(shape, mine, strides, strict=False))
    if len(step.shape) > len(whole) or not plain:
        return f"offset {step.offset}, stride {step.stride}"
    parts, rest = [], step.offset
    for size, of, stride in zip(shape, whole, strides, strict=True):
        start, rest = divmod(rest, stride)
        index = (
            str(start) if size == 1 and len(whole) > len(step.shape) else f"{start}:{start + size}"
        )
        parts.append(":" if size == of else index)
    return ", ".join(parts)


def _span(step: Destination, whole: Sequence[int]) -> tuple[float, float]:
    size = max(1, _numel(whole))
    last = step.offset + sum((n - 1) * s for n, s in zip(step.shape, step.stride, strict=True)) + 1
    return step.offset / size, min(1.0, last / size)


def _strides(shape: Sequence[int]) -> tuple[int, ...]:
    return tuple(max(1, _numel(shape[i + 1 :])) for i in range(len(shape)))


def _numel(shape: Sequence[int]) -> int:
    size = 1
    for n in shape:
        size *= n
    return size


def _together(lines: Iterable[Line]) -> list[Line]:
    alike: dict[Line, list[Line]] = {}
    for line in lines:
        alike.setdefault(_without_numbers(line), []).append(line)
    return [_one_of(found) for found in alike.values()]


def _without_numbers(line: Line) -> Line:
    """What lines have in common that differ by the number of a block, or of an expert."""
    return replace(
        line,
        name=_NUMBER.sub("*", line.name),
        target=_NUMBER.sub("*", line.target),
        window=re.sub(r"^\d+,", "*,", line.window),
        span=line.span if not re.match(r"\d+,", line.window) else (0.0, 1.0),
    )


def _one_of(found: Sequence[Line]) -> Line:
    first = found[0]
    if len(found) == 1:
        return first
    common = _without_numbers(first)
    return replace(
        common,
        name=numbers_apart([line.name for line in found]),
        target=numbers_apart([line.target for line in found]),
        alike=len(found),
    )


def names_together(names: Iterable[str]) -> list[str]:
    """Fewer names: one for all that differ in numbers only."""
    alike: dict[str, list[str]] = {}
    for name in names:
        alike.setdefault(_NUMBER.sub("*", name), []).append(name)
    return [numbers_apart(found) for found in alike.values()]


def numbers_apart(names: Sequence[str]) -> str:
    """One name for several that differ in numbers: `layers.{0-29}.mlp`."""
    columns = zip(*(map(int, _NUMBER.findall(name)) for name in names), strict=True)
    shown = iter([_range(sorted(set(column))) for column in columns])
    return _NUMBER.sub(lambda _: next(shown), names[0])


def _range(numbers: Sequence[int]) -> str:
    if len(numbers) == 1:
        return str(numbers[0])
    first, last = numbers[0], numbers[-1]
    whole = last - first + 1 == len(numbers)
    return f"{{{first}-{last}}}" if whole else f"{{{first}..{last}}}"
