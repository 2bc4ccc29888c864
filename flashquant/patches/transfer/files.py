"""Weights by way of a folder that the trainer writes and the workers read.

init     {"folder": "/shared/run-7"}
update   {"path": "step-12.safetensors"}      a file or a folder of them, inside that folder; or
                                              what `flashquant.sender.Delta.save` has written
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from vllm.distributed.weight_transfer.base import WeightTransferInitInfo, WeightTransferUpdateInfo

from flashquant.errors import ReloadError
from flashquant.patches.seams.loading import deltas_of, find_session
from flashquant.patches.transfer.bracketed import Bracketed, Load
from flashquant.plan import named_tensors
from flashquant.sender import Delta


@dataclass
class Folder(WeightTransferInitInfo):  # type: ignore[misc]
    """Where the trainer puts its files; nothing outside is ever read."""

    folder: str


@dataclass
class File(WeightTransferUpdateInfo):  # type: ignore[misc]
    """One .safetensors file, or a folder of them, relative to the folder of the start."""

    path: str


class FileEngine(Bracketed):
    """Reads each chunk from safetensors."""

    init_info_cls = Folder
    update_info_cls = File

    _folder: Path | None = None

    def init_transfer_engine(self, init_info: Folder) -> None:
        """Agree on a folder.

        Raises:
            ReloadError: there is none, seen from this worker.

        """
        folder = Path(init_info.folder).resolve()
        if not folder.is_dir():
            raise ReloadError(
                f"{folder} is no folder on this worker's machine; share it, or mount it"
            )
        self._folder = folder

    def receive_weights(self, update_info: File, load_weights: Load | None = None) -> None:
        """Load one file, or a folder of them; or what changed, which is an update by itself.

        Raises:
            ReloadError: the path leads out of the agreed folder, or holds no safetensors, or they
                were written meanwhile; a bundle of changes does not fit (`StaleBase`,
                `BrokenDelta`).

        """
        if self._folder is None:
            raise ReloadError("init_weight_transfer_engine has not named a folder yet")
        path = (self._folder / update_info.path).resolve()
        if not path.is_relative_to(self._folder):
            raise ReloadError(f"{update_info.path} leads out of {self._folder}; it is not read")
        if Delta.is_at(path):
            deltas_of(self.model).take(path)
            return
        # A loader of vLLM's own, of an engine that flashquant does not serve, may list them all.
        reuses = find_session(self.model) is not None
        (load_weights or self.model.load_weights)(named_tensors(path, reuses=reuses))
