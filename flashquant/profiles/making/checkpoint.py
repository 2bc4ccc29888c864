"""Checkpoints on disk: read by name, and written as W8A8 in compressed-tensors format."""

from __future__ import annotations

import json
import shutil
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any, Final

import torch
from safetensors.torch import save_file
from torch import Tensor

from flashquant.config.schemes import W8A8
from flashquant.errors import ProfileError
from flashquant.profiles import Profile
from flashquant.schemes import int8_frozen, scaled_norm
from flashquant.tensor_files import TensorFile

_INDEX: Final = "model.safetensors.index.json"
# What else a model needs; nothing that could be run.
_BESIDE: Final = (".json", ".txt", ".model", ".jinja")


class Checkpoint(Mapping[str, Tensor]):
    """The tensors of a folder of safetensors files, each read when it is asked for.

    Raises:
        ProfileError: the folder holds none.

    """

    def __init__(self, folder: str | Path) -> None:
        self.folder = Path(folder)
        self._files: dict[str, TensorFile] = {}
        self.by_file: dict[str, tuple[str, ...]] = {}
        paths = sorted(self.folder.glob("*.safetensors"))
        # A profile may lie beside the weights it was made for.
        for path in paths:
            try:
                opened = TensorFile(path)
            except OSError as broken:
                raise ProfileError(f"{path} is no safetensors file ({broken})") from broken
            if opened.metadata.get("flashquant_profile") is None:
                self.by_file[path.name] = tuple(opened)
                self._files |= dict.fromkeys(self.by_file[path.name], opened)
        if not self._files or not (self.folder / "config.json").is_file():
            raise ProfileError(
                f"{self.folder} is no folder of a model: it should hold config.json and "
                ".safetensors files. Download one with `hf download`."
            )

    @property
    def config(self) -> dict[str, Any]:
        """What config.json says."""
        read: dict[str, Any] = json.loads((self.folder / "config.json").read_text("utf-8"))
        return read

    def __getitem__(self, name: str) -> Tensor:
        return self._files[name][name]

    def __iter__(self) -> Iterator[str]:
        return iter(self._files)

    def __len__(self) -> int:
        return len(self._files)


def write_w8a8(source: Checkpoint, profile: Profile, folder: str | Path) -> Path:
    """Write the W8A8 checkpoint of a bf16 one: what an engine with this profile would hold.

    Args:
        source: the bf16 checkpoint.
        profile: made of it; knows its weight scales.
        folder: must not exist yet.

    Raises:
        ProfileError: the folder is there, or the profile knows no weight scales.

    """
    target = Path(folder)
    if target.exists():
        raise ProfileError(f"{target} is there already; name a new folder")
    if not profile.knows_weight_scales():
        raise ProfileError(f"{profile.source} knows no weight scales; make it with `profile make`")
    target.mkdir(parents=True)
    index: dict[str, str] = {}
    for file, names in source.by_file.items():
        stored = dict(pair for name in names for pair in _stored(name, source[name], profile))
        save_file(stored, target / file, metadata={"format": "pt"})
        index |= dict.fromkeys(stored, file)
    if len(source.by_file) > 1:
        (target / _INDEX).write_text(json.dumps({"metadata": {}, "weight_map": index}, indent=2))
    for path in sorted(source.folder.iterdir()):
        if path.is_file() and path.suffix in _BESIDE and path.name != _INDEX:
            shutil.copyfile(path, target / path.name)
    config = {**source.config, "quantization_config": {**W8A8, "quantization_status": "compressed"}}
    (target / "config.json").write_text(json.dumps(config, indent=2) + "\n")
    return target


def _stored(name: str, tensor: Tensor, profile: Profile) -> Iterator[tuple[str, Tensor]]:
    entry = profile.entries.get(name)
    if entry is None:
        yield name, tensor
    elif entry.kind == torch.int8 and entry.weight_scale is not None:
        yield name, int8_frozen(tensor, entry.input_scale, entry.output_scale).codes
        yield f"{name}_scale", entry.weight_scale.unsqueeze(1).contiguous()
    else:
        yield name, scaled_norm(tensor, entry.input_scale, entry.offset).to(entry.kind)
