"""What an inspection tells of a checkpoint: plain data, that becomes a table, JSON or a picture."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Literal

from flashquant.update import WhyInBf16

What = Literal["copy", "fill", "loader"]
How = Literal["in place", "whole", "copied", "processed", "loader"]
"""How a layer is updated.

    in place   rows are written where the kernels read them, quantized on their way where they are
    whole      the same, when all of a parameter has come: its codes share a scale
    copied     nothing is made of it: values are copied over the live ones
    processed  vLLM packs, transposes or quantizes it: done again on a twin, and carried over
    loader     a tensor of it is placed by vLLM's loader at every push: it does more than copy
"""


@dataclass(frozen=True)
class Form:
    """Dtype and shape of a tensor; `oneDNN handler` and (k, n) of what shows no tensor."""

    dtype: str
    shape: tuple[int, ...]

    def __str__(self) -> str:
        return f"{self.dtype} {' x '.join(map(str, self.shape))}"


@dataclass(frozen=True)
class Destination:
    """One step of a write plan; units are elements.

    Attributes:
        target: the engine's parameter.
        shape: of the window that is written.
        stride: of the window, in the parameter.
        offset: where it begins, counted from the start of the parameter.
        what: `copy`, `fill` (padding), or `loader` (vLLM's own loader runs).
        detail: the constant, or what the loader does.

    """

    target: str
    shape: tuple[int, ...]
    stride: tuple[int, ...]
    offset: int
    what: What
    detail: str = ""


@dataclass(frozen=True)
class InspectedTensor:
    """One tensor of the checkpoint: where it goes, or why nowhere.

    Attributes:
        steps: none where vLLM's loader drops the name, or refuses it.
        refused: what the loader says; empty where it takes the tensor.

    """

    name: str
    form: Form
    steps: tuple[Destination, ...]
    refused: str = ""


@dataclass(frozen=True)
class InspectedLayer:
    """One live layer: the modules whose parameters go live together.

    Attributes:
        name: of its first module.
        module: the class of that.
        processed_by: the classes of vLLM that process its weights, outermost first.
        how: see `How`.
        quantized: whether kernels read codes of it.
        parameters: its parameters, in checkpoint format.
        reads: what its kernels read, by path; seen in the layer of its kind that was processed.
        scheme: what its codes are of; None where kernels read none.

    """

    name: str
    module: str
    processed_by: tuple[str, ...]
    how: How
    quantized: bool
    parameters: Mapping[str, Form]
    reads: Mapping[str, Form]
    scheme: str | None = None

    def kept_as(self, target: str) -> str:
        """The dtype in which kernels read one of its parameters."""
        form, read = self.parameters[target], self.reads.get(target.removeprefix(f"{self.name}."))
        return read.dtype if self.quantized and read is not None else form.dtype


@dataclass(frozen=True)
class Inspection:
    """The write plan of one checkpoint under one configuration; plain data.

    Attributes:
        unfilled: parameters that no tensor of the checkpoint fills.
        looked_at: the layers that were processed to know the others by, one a kind.
        in_bf16: as of a `Status`: what stays in bf16 in an engine of codes, and why.

    """

    model: str
    architecture: str
    scheme: str
    device: str
    tensors: tuple[InspectedTensor, ...]
    layers: tuple[InspectedLayer, ...]
    unfilled: tuple[str, ...]
    looked_at: tuple[str, ...]
    in_bf16: Mapping[str, WhyInBf16] = field(default_factory=dict)

    @property
    def ignored(self) -> tuple[str, ...]:
        """The names that vLLM's loader drops on purpose."""
        return tuple(t.name for t in self.tensors if not t.steps and not t.refused)
