"""Tensors on their way to workers in other processes: files of them, written as they come.

Whoever yields tensors may fill the same memory again for the next one, so each is in a file, or
copied, before that is asked for. What is wrong with one by itself is said here, as it would be
where the workers are in the caller's own process.
"""

from __future__ import annotations

import os
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Final

import torch
from safetensors.torch import save_file
from torch import Tensor

from flashquant.errors import MisfitTensor
from flashquant.plan import CARRIED, Weights, named_tensors
from flashquant.schemes import check_form, check_plain, in_ordinary_memory
from flashquant.sender import Delta

_AT_ONCE: Final = 256 << 20  # bytes in a file, or one tensor


@contextmanager
def carried(weights: Weights) -> Iterator[str]:
    """The weights as a path that workers in other processes can read, as long as the call lasts.

    Tensors go through safetensors files in shared memory, or where the system
    keeps temporary files.

    Raises:
        MisfitTensor: what is sent under a name is no dense tensor that holds values, or a name
            comes twice.
        ReloadError: as `named_tensors`.

    """
    if isinstance(weights, str | os.PathLike):
        yield str(Path(weights).resolve())
        return
    with _folder() as folder:
        place = folder / CARRIED
        place.mkdir()
        stays = isinstance(weights, dict | list | tuple)
        for number, few in enumerate(_by_file(_ordinary(weights), stays=stays)):
            save_file(few, place / f"{number:06}.safetensors")
        yield str(place)


@contextmanager
def saved(delta: Delta | str | os.PathLike[str]) -> Iterator[str]:
    """A bundle as a path, likewise."""
    if not isinstance(delta, Delta):
        yield str(Path(delta).resolve())
        return
    with _folder() as folder:
        file = folder / "delta.safetensors"
        delta.save(file)
        yield str(file)


def _ordinary(weights: Weights) -> Iterator[tuple[str, Tensor]]:
    """Each tensor, if it is one that can be written into a file."""
    names: set[str] = set()
    for name, sent in named_tensors(weights):
        if name in names:
            raise MisfitTensor(f"{name} arrived twice in one update; send each tensor once")
        names.add(name)
        check_plain(name, sent)
        check_form(name, sent, tuple(sent.shape))
        yield name, in_ordinary_memory(sent.detach())


def _by_file(weights: Iterator[tuple[str, Tensor]], *, stays: bool) -> Iterator[dict[str, Tensor]]:
    """The tensors of each file, contiguous; one file at least.

    Args:
        stays: the memory of all of them holds what it holds until the call is over.

    """
    few: dict[str, Tensor] = {}
    storages: set[int] = set()  # safetensors takes no memory twice, as a tied head's
    size = 0
    for name, tensor in weights:
        storage = tensor.untyped_storage().data_ptr()
        apart = stays and storage not in storages
        held = tensor.contiguous() if apart else tensor.clone(memory_format=torch.contiguous_format)
        few[name] = held
        storages.add(storage)
        size += held.nbytes
        if size >= _AT_ONCE:
            yield few
            few, storages, size = {}, set(), 0
    yield few


@contextmanager
def _folder() -> Iterator[Path]:
    shared = "/dev/shm" if Path("/dev/shm").is_dir() else None
    with tempfile.TemporaryDirectory(prefix="flashquant-", dir=shared) as folder:
        yield Path(folder)
