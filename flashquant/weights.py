"""Whatever a caller hands over becomes a stream of `(name, tensor)` pairs.

Nothing here is executed: a path means safetensors files, never a pickle.
"""

from __future__ import annotations

import os
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path

from safetensors import SafetensorError, safe_open
from torch import Tensor

from flashquant.errors import ReloadError

NamedTensors = Iterable[tuple[str, Tensor]]
_FEW = 64
_LARGE = 4 << 20  # bytes; so 256 MiB wait at most
Weights = NamedTensors | Mapping[str, Tensor] | str | os.PathLike[str]


def named_tensors(weights: Weights) -> Iterator[tuple[str, Tensor]]:
    """Yield `(name, tensor)` from a dict, an iterable of pairs, or a path.

    A path is one `.safetensors` file or a folder of them (a Hugging Face
    checkpoint); its tensors are read one at a time.

    Raises:
        ReloadError: the path holds no safetensors.

    """
    if isinstance(weights, str | os.PathLike):
        yield from _stored(Path(weights))
    elif isinstance(weights, Mapping):
        yield from weights.items()
    else:
        yield from weights


def few_at_a_time(weights: NamedTensors) -> Iterator[list[tuple[str, Tensor]]]:
    """The same pairs in the same order, small ones together, for what is cheaper done together.

    Who sends a tensor may reuse its memory as soon as the next one is asked for, so those that
    wait are copies; a large one is passed on as it is, alone.
    """
    few: list[tuple[str, Tensor]] = []
    for name, tensor in weights:
        alone = tensor.nbytes > _LARGE
        if few and (alone or len(few) == _FEW):
            yield few
            few = []
        few.append((name, tensor if alone else tensor.clone()))
        if alone:
            yield few
            few = []
    if few:
        yield few


class Offered:
    """Pairs, and the names of those that one call offers.

    Attributes:
        names: of a list, all; of an iterator, those that have been drawn from it.

    """

    def __init__(self, weights: NamedTensors) -> None:
        self._weights = weights
        listed = weights if isinstance(weights, list | tuple) else ()
        self.names = {name for name, _ in listed}

    def __iter__(self) -> Iterator[tuple[str, Tensor]]:
        for name, tensor in self._weights:
            self.names.add(name)
            yield name, tensor


def _stored(path: Path) -> Iterator[tuple[str, Tensor]]:
    files = sorted(path.glob("*.safetensors")) if path.is_dir() else [path]
    if not files or not all(file.is_file() and file.suffix == ".safetensors" for file in files):
        raise ReloadError(
            f"{path} is neither a .safetensors file nor a folder that holds some. "
            "Save the weights with safetensors; pickled files are never loaded."
        )
    for file in files:
        try:
            opened = safe_open(file, framework="pt")
        except SafetensorError as broken:
            raise ReloadError(
                f"{file} is no safetensors file ({broken}); write it again"
            ) from broken
        with opened as tensors:
            for name in tensors.keys():  # noqa: SIM118  (safe_open is no mapping)
                yield name, tensors.get_tensor(name)
