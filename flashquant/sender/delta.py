"""One update as a bundle of plain tensors with a typed header, in a safetensors file or in memory.

    header                            metadata "flashquant", JSON: DeltaHeader
    model.norm.weight                 a tensor that is sent whole
    model.layers.0....weight#gaps     which elements of another one changed (or #bitmap)
    model.layers.0....weight#values   and what they are now

Whatever comes from elsewhere is checked when a `Delta` is made of it: a `Delta` that exists is
consistent in itself. Whether it fits an engine is looked at there, before anything is touched.
"""

from __future__ import annotations

import math
import os
import stat
import tempfile
from collections.abc import Collection, Iterator, Mapping
from pathlib import Path
from typing import Final, Literal

from pydantic import BaseModel, ConfigDict, ValidationError
from safetensors import SafetensorError
from safetensors.torch import save_file
from torch import Tensor

from flashquant.errors import BrokenDelta
from flashquant.sender.changes import Change, Form, Remember, apply, check, write
from flashquant.sender.manifest import Digest, Dtype, Size, TensorSpec, dtype_name
from flashquant.tensor_files import TensorFile

MARK: Final = "#"  # between a tensor's name and what a part says of it
_KEY: Final = "flashquant"
_AGAIN: Final = "Have it sent again, or take a whole bundle (`Sender.snapshot()`)."


class TensorChange(BaseModel):
    """What a bundle says of one tensor.

    Attributes:
        shape: of the whole tensor.
        dtype: of its elements.
        form: `whole`, or how the places are said.
        changed: how many elements have a value in the bundle.
        fingerprint: of the tensor that comes out. A worker that holds nothing of it, because
            others have these experts, takes the sender's word for its part of the digest.

    """

    model_config = ConfigDict(frozen=True, extra="forbid")

    shape: tuple[Size, ...]
    dtype: Dtype
    form: Form
    changed: Size
    fingerprint: Digest


class DeltaHeader(BaseModel):
    """What a bundle is.

    Attributes:
        format: of the bundle.
        scheme: canonical name of the scheme that its codes are in.
        version: which bundle of its sender this is, from 1.
        base: the digest of the policy that it changes (`Manifest.digest`); None where it is whole.
        digest: of the policy that comes out.
        tensors: those that change, by name; all of them where it is whole.

    """

    model_config = ConfigDict(frozen=True, extra="forbid")

    format: Literal[1] = 1
    scheme: str
    version: Size
    base: Digest | None
    digest: Digest
    tensors: dict[str, TensorChange]


class Delta:
    """What changed from one policy to the next, or a policy whole; lossless.

    Attributes:
        header: what it is.
        parts: its tensors, by the names they have in a file. Of one that was loaded, whole tensors
            are read whenever they are asked for, each into new memory.

    """

    def __init__(self, header: DeltaHeader, parts: Mapping[str, Tensor]) -> None:
        """Raises:
        BrokenDelta: header and tensors contradict each other.

        """
        self.header = header
        self.parts, self._forms = parts, parts
        if isinstance(parts, _Stored):
            self._forms = parts.forms
        else:
            self.parts = self._forms = {name: part.contiguous() for name, part in parts.items()}
        expected = {part for name in header.tensors for part in _part_names(name, header)}
        if odd := sorted(expected ^ self.parts.keys()):
            raise BrokenDelta(f"{odd[0]} is in a bundle's header or among its tensors. {_AGAIN}")
        for name, said in header.tensors.items():
            try:
                _check(self._change(name, self._forms), said, whole=self.is_whole)
            except ValueError as wrong:
                raise BrokenDelta(f"{name} in a bundle: {wrong}. {_AGAIN}") from wrong

    @classmethod
    def of(
        cls,
        changes: Mapping[str, tuple[TensorSpec, Change]],
        *,
        scheme: str,
        version: int,
        base: str | None,
        digest: str,
        fingerprints: Mapping[str, str],
    ) -> Delta:
        """The bundle of these changes; they are brought to the host.

        Args:
            changes: by name.
            scheme, version, base, digest: as of the header.
            fingerprints: of each tensor that comes out.

        """
        parts: dict[str, Tensor] = {}
        for name, (_, found) in changes.items():
            if found.places is None:
                parts[name] = found.values.cpu()
            else:
                parts[f"{name}{MARK}{found.form}"] = found.places.cpu()
                parts[f"{name}{MARK}values"] = found.values.cpu()
        said = {
            name: TensorChange(
                shape=spec.shape,
                dtype=spec.dtype,
                form=found.form,
                changed=found.values.numel(),
                fingerprint=fingerprints[name],
            )
            for name, (spec, found) in changes.items()
        }
        header = DeltaHeader(scheme=scheme, version=version, base=base, digest=digest, tensors=said)
        return cls(header, parts)

    @property
    def is_whole(self) -> bool:
        """Whether it needs no base: it holds the whole policy."""
        return self.header.base is None

    @property
    def nbytes(self) -> int:
        """Bytes of its tensors; a header comes on top."""
        return sum(part.nbytes for part in self._forms.values())

    def change(self, name: str) -> Change:
        """What it says of a tensor of its header."""
        return self._change(name, self.parts)

    def _change(self, name: str, parts: Mapping[str, Tensor]) -> Change:
        form = self.header.tensors[name].form
        if form == "whole":
            return Change(form, None, parts[name])
        return Change(form, parts[f"{name}{MARK}{form}"], parts[f"{name}{MARK}values"])

    def owned(self, name: str) -> Tensor:
        """A tensor that it holds whole, in memory that nobody else has."""
        part = self.parts[name]
        return part if isinstance(self.parts, _Stored) else part.clone()

    def rebuilt(self, name: str, base: Tensor) -> Tensor:
        """The new value of a tensor, made in the memory of its old one unless it came whole."""
        return apply(self.change(name), base)

    def write(self, name: str, live: Tensor, remember: Remember) -> None:
        """Make the new value of a tensor in the memory of its old one (contiguous).

        Args:
            remember: takes what puts the old value back, and its bytes, before anything is written.

        """
        try:
            write(self.change(name), live, remember)
        except ValueError as wrong:
            raise BrokenDelta(f"{name} in a bundle: {wrong}. {_AGAIN}") from wrong

    def check_fits(
        self, scheme: str, specs: Mapping[str, TensorSpec], elsewhere: Collection[str] = ()
    ) -> None:
        """Whether it is one for an engine that wants these tensors.

        Args:
            scheme: that the engine serves.
            specs: what this worker wants.
            elsewhere: what others want, and this one has nothing of.

        Raises:
            BrokenDelta: it is of another scheme, of other tensors, or not whole though it has no
                base.

        """
        header = self.header
        if header.scheme != scheme:
            raise BrokenDelta(
                f"a bundle is in {header.scheme}, and the engine serves {scheme}. Make a sender "
                "from flashquant.manifest(...) of this engine."
            )
        for name, said in header.tensors.items():
            spec = specs.get(name)
            if name in elsewhere:
                continue
            if spec is None or (spec.shape, spec.dtype) != (said.shape, said.dtype):
                wanted = "none" if spec is None else f"{spec.dtype} {spec.shape}"
                raise BrokenDelta(
                    f"{name} in a bundle is {said.dtype} {said.shape}, and the engine wants "
                    f"{wanted}. Make a sender from flashquant.manifest(...) of this engine."
                )
        if self.is_whole and (missing := sorted(specs.keys() - header.tensors.keys())):
            raise BrokenDelta(f"a whole bundle lacks {missing[0]}. {_AGAIN}")

    def save(self, path: str | os.PathLike[str]) -> None:
        """Write it to a safetensors file: whole, or not at all. Who may read it, the umask says.

        Raises:
            OSError: it could not be written; what was there under this name is there.

        """
        path = Path(path)
        with tempfile.TemporaryDirectory(dir=path.parent, prefix=f".{path.name}.") as folder:
            scratch = Path(folder) / path.name
            scratch.touch()
            mode = scratch.stat().st_mode  # safetensors lets nobody but its own user read
            try:
                save_file(dict(self.parts), scratch, metadata={_KEY: self.header.model_dump_json()})
            except SafetensorError as failure:
                raise OSError(f"{path} could not be written ({failure})") from failure
            if scratch.stat().st_mode != mode:
                scratch.chmod(stat.S_IMODE(mode))
            with scratch.open("rb") as written:
                os.fsync(written.fileno())
            os.replace(scratch, path)

    @staticmethod
    def is_at(path: str | os.PathLike[str]) -> bool:
        """Whether a path is that of a file that says it is a bundle."""
        try:
            with TensorFile(path) as file:
                return _KEY in file.metadata
        except OSError:
            return False

    @classmethod
    def load(cls, path: str | os.PathLike[str]) -> Delta:
        """Read one from a safetensors file.

        Raises:
            BrokenDelta: it is none, was cut, or contradicts itself.

        """
        try:
            file = TensorFile(path)
            return cls.of_parts(file.metadata.get(_KEY, ""), _Stored(file, path), path)
        except OSError as broken:
            raise BrokenDelta(f"{path} is no whole bundle ({broken}). {_AGAIN}") from broken

    @classmethod
    def of_parts(
        cls, header: str, parts: Mapping[str, Tensor], where: object = "what came"
    ) -> Delta:
        """One whose header came as JSON.

        Args:
            header: it.
            parts: its tensors.
            where: they came from, for the error.

        Raises:
            BrokenDelta: it is no header, or contradicts the tensors.

        """
        try:
            said = DeltaHeader.model_validate_json(header)
        except ValidationError as broken:
            raise BrokenDelta(f"{where} is no whole bundle ({broken}). {_AGAIN}") from broken
        return cls(said, parts)


class _Stored(Mapping[str, Tensor]):
    """The tensors of a file.

    Places, which say what is written, and the way back, are read once: they stay what they were
    when they were checked. Whole tensors are as large as an engine's, so they are read one by one.
    """

    def __init__(self, file: TensorFile, path: str | os.PathLike[str]) -> None:
        self._file, self._path = file, path
        self._places = {name: file[name] for name in file if MARK in name}
        self.forms = {name: self._places.get(name, file.form(name)) for name in file}

    def __getitem__(self, name: str) -> Tensor:
        try:
            return self._places[name] if name in self._places else self._file[name]
        except OSError as broken:
            raise BrokenDelta(
                f"{self._path} cannot be read any more ({broken}). {_AGAIN}"
            ) from broken

    def __iter__(self) -> Iterator[str]:
        return iter(self.forms)

    def __len__(self) -> int:
        return len(self.forms)

    def __reduce__(self) -> tuple[type, tuple[dict[str, Tensor]]]:
        return dict, (dict(self),)  # another process has no such descriptor


def _part_names(name: str, header: DeltaHeader) -> Iterator[str]:
    form = header.tensors[name].form
    if form == "whole":
        yield name
    else:
        yield f"{name}{MARK}{form}"
        yield f"{name}{MARK}values"


def _check(found: Change, said: TensorChange, *, whole: bool) -> None:
    """Raise ValueError unless the tensors of a change are what its header says."""
    values, numel = found.values, math.prod(said.shape)
    if dtype_name(values.dtype) != said.dtype or values.numel() != said.changed:
        raise ValueError(f"its values are {values.dtype} {tuple(values.shape)}")
    if found.form == "whole":
        if tuple(values.shape) != said.shape:
            raise ValueError(f"it has shape {tuple(values.shape)}, and should have {said.shape}")
        return
    if whole:
        raise ValueError("the bundle has no base, so it cannot be changed in part")
    check(found, numel)
