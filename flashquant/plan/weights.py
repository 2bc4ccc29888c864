"""Whatever a caller hands over becomes a stream of `(name, tensor)` pairs.

Nothing here is executed: a path means safetensors files, never a pickle.
"""

from __future__ import annotations

import json
import os
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import cast

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from flashquant.errors import ReloadError
from flashquant.scratch import Scratch
from flashquant.tensor_files import TensorFile, Written

NamedTensors = Iterable[tuple[str, Tensor]]
CARRIED = "flashquant-carried"  # a folder of tensors on their way to another process
_INDEX = ".safetensors.index.json"
_FEW = 64
_LARGE = 4 << 20  # bytes; so 256 MiB wait at most
Weights = NamedTensors | Mapping[str, Tensor] | str | os.PathLike[str]


def named_tensors(weights: Weights, *, reuses: bool = False) -> Iterator[tuple[str, Tensor]]:
    """Yield `(name, tensor)` from a dict, an iterable of pairs, or a path.

    A path is one `.safetensors` file or a folder of them (a Hugging Face
    checkpoint); its tensors are read one at a time. Of a folder, those files are read that
    vLLM's own loader reads: `consolidated*.safetensors` before any others, and of what there
    is, only what the index lists, if there is an index. Files are read into memory of one's own:
    whoever cuts or writes them meanwhile is noticed, in the end at the latest.

    Args:
        weights: them.
        reuses: a tensor of a file need be good only until the next one is asked for.

    Raises:
        ReloadError: the path holds no safetensors, or not those that its index lists, or they were
            written while they were read; or this is none of the three, or no pairs.

    """
    if isinstance(weights, str | os.PathLike):
        return Stored(Path(weights), reuses=reuses)
    if not isinstance(weights, Iterable):
        raise ReloadError(
            f"a {type(weights).__name__} is no weights. Pass a dict of name to tensor (of a "
            "module, its `state_dict()`), pairs of them, or the path of safetensors."
        )
    return _pairs(weights.items() if isinstance(weights, Mapping) else weights)


def _pairs(weights: Iterable[object]) -> Iterator[tuple[str, Tensor]]:
    for pair in weights:
        match pair:
            case (str(name), tensor):
                yield name, cast(Tensor, tensor)  # whoever takes it looks at what it is
            case _:
                raise ReloadError(
                    f"in the place of a name and its tensor came a {type(pair).__name__}: "
                    f"{str(pair)[:60]!r}. Pass a dict of name to tensor, or pairs of them."
                )


def stored_names(path: Path) -> tuple[str, ...]:
    """The names of all tensors at such a path, of which none is read.

    Args:
        path: as of `named_tensors`, or an index of safetensors by itself.

    Raises:
        ReloadError: as `named_tensors`.

    """
    if path.name.endswith(_INDEX):
        return tuple(_weight_map(path))
    names: list[str] = []
    for file in _files(path):
        with _opened(file) as tensors:
            names += tensors
    return tuple(names)


def named_forms(path: str | os.PathLike[str]) -> Iterator[tuple[str, Tensor]]:
    """The names, shapes and dtypes of `named_tensors(path)`, as meta tensors; reads only headers.

    Raises:
        ReloadError: as `named_tensors`.

    """
    for file in _files(Path(path)):
        with _opened(file) as tensors:
            for name in tensors:
                yield name, tensors.form(name)


class Stored(Iterator[tuple[str, Tensor]]):
    """The tensors that lie at a path.

    Args:
        path: as of `named_tensors`.
        reuses: each is good until the next one is asked for, whose memory is the same.

    Attributes:
        file: which the last one came from.

    """

    def __init__(self, path: Path, *, reuses: bool = False) -> None:
        self.file = path
        self._scratch = Scratch() if reuses else None
        self._tensors = self._read(path)

    def __next__(self) -> tuple[str, Tensor]:
        return next(self._tensors)

    def _read(self, path: Path) -> Iterator[tuple[str, Tensor]]:
        files = _files(path)
        if path.name == CARRIED:  # flashquant's own, which nobody cuts: that saves a copy
            for file in files:
                yield from _mapped(file)
            return
        before = {file: _written(file) for file in files}
        for self.file in files:
            with _opened(self.file) as tensors:
                _check_same(self.file, before[self.file], tensors.written)
                for name in tensors:
                    yield name, tensors.read(name, self._room)
        for self.file in files:  # a policy that is written while it is read is a mixture
            _check_same(self.file, before[self.file], _written(self.file))

    def _room(self, nbytes: int) -> Tensor:
        cpu = torch.device("cpu")
        if self._scratch is None:
            return torch.empty(nbytes, dtype=torch.uint8, device=cpu)
        return self._scratch.room(nbytes, cpu)


def _mapped(file: Path) -> Iterator[tuple[str, Tensor]]:
    try:
        with safe_open(file, framework="pt") as tensors:
            for name in tensors.keys():  # noqa: SIM118  (safe_open is no mapping)
                yield name, tensors.get_tensor(name)
    except (SafetensorError, OSError) as broken:
        raise ReloadError(f"{file} cannot be read ({broken}); push again") from broken


def _written(file: Path) -> Written | None:
    """What a file is now; None where it is gone, which changes nothing of what was read of it."""
    try:
        return Written.of(file)
    except OSError:
        return None


def _check_same(file: Path, before: Written | None, now: Written | None) -> None:
    if before is not None and now is not None and before != now:
        raise ReloadError(
            f"{file} was written while it was read, so what came of it may be of two policies. "
            "Write the weights to a new path each time, or move them there when they are whole."
        )


def naming_the_file(failure: ReloadError, weights: object) -> ReloadError:
    """The same failure with the file in its words, where its tensor came from one of the caller's.

    Not where it was `CARRIED`: that is gone with the call.
    """
    if not isinstance(weights, Stored) or weights.file.name == CARRIED:
        return failure
    if str(weights.file) in str(failure):
        return failure
    return type(failure)(f"{failure} (The last tensor was read from {weights.file}.)")


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


@contextmanager
def _opened(file: Path) -> Iterator[TensorFile]:
    """A safetensors file, with what is wrong with it said in a ReloadError."""
    try:
        with TensorFile(file) as tensors:
            yield tensors
    except OSError as broken:
        raise ReloadError(
            f"{file} is no safetensors file that can be read ({broken}); write it again"
        ) from broken


def _files(path: Path) -> list[Path]:
    """The safetensors at a path that vLLM would load."""
    consolidated = sorted(path.glob("consolidated*.safetensors"))  # Mistral's own format
    files = consolidated or sorted(path.glob("*.safetensors")) if path.is_dir() else [path]
    if not files or not all(file.is_file() and file.suffix == ".safetensors" for file in files):
        raise ReloadError(
            f"{path} is neither a .safetensors file nor a folder that holds some. "
            "Save the weights with safetensors; pickled files are never loaded."
        )
    kind = "consolidated" if consolidated else "model"
    index = path / f"{kind}{_INDEX}"
    if not index.is_file():
        return files
    listed = set(_weight_map(index).values())
    if missing := sorted(listed - {file.name for file in files}):
        raise ReloadError(
            f"{index} lists files that are not there: {', '.join(missing[:3])}. Write the "
            "checkpoint again, whole, or without an index."
        )
    return [file for file in files if file.name in listed]


def _weight_map(index: Path) -> dict[str, str]:
    """The name of every tensor that an index speaks of, and of the file that it lies in."""
    try:
        listed = json.loads(index.read_text())["weight_map"].items()
        return {str(name): str(file) for name, file in listed}
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as broken:
        raise ReloadError(
            f"{index} is no index of safetensors ({type(broken).__name__}: {broken}); write it "
            "again, or remove it"
        ) from broken
