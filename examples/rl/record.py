"""What a run leaves behind: one JSON line a step, and a checkpoint to go on from.

OUT/int8+tis/seed-0/metrics.jsonl
OUT/int8+tis/seed-0/step-000040/{model.safetensors,optimizer.pt}
"""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from torch import nn


class AlreadyRecorded(RuntimeError):
    """There is a run where another one is to be written."""


class Record:
    """The folder of one arm and one seed."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self._lines = folder / "metrics.jsonl"
        folder.mkdir(parents=True, exist_ok=True)

    def begin(self) -> None:
        """Begin anew, where nothing was recorded yet.

        Raises:
            AlreadyRecorded: a run has been here.

        """
        if self._lines.exists() or self._checkpoints():
            raise AlreadyRecorded(
                f"{self.folder} holds a run already. Go on with --resume, or name another --out."
            )

    def write(self, line: dict[str, Any]) -> None:
        """Append the metrics of one step."""
        with self._lines.open("a", encoding="utf-8") as file:
            file.write(json.dumps(line) + "\n")

    def read(self) -> list[dict[str, Any]]:
        """All whole lines. A run that was killed may have left half of one, the last."""
        if not self._lines.is_file():
            return []
        text = self._lines.read_text(encoding="utf-8")
        return [json.loads(line) for line in text.splitlines(keepends=True) if line.endswith("\n")]

    def save(self, step: int, model: nn.Module, optimizer: torch.optim.Optimizer) -> None:
        """A checkpoint after a step; it takes the place of the one before, when it is whole."""
        older = self._checkpoints()
        unfinished = self.folder / "unfinished"
        shutil.rmtree(unfinished, ignore_errors=True)
        unfinished.mkdir()
        weights = {name: p.detach().clone() for name, p in model.named_parameters()}
        save_file(weights, unfinished / "model.safetensors")
        torch.save(optimizer.state_dict(), unfinished / "optimizer.pt")
        unfinished.rename(self.folder / f"step-{step:06}")
        for folder in older:
            shutil.rmtree(folder)

    def resume(self, model: nn.Module, optimizer: torch.optim.Optimizer) -> int:
        """Put both back as the last checkpoint has them; the step it was made after, or 0.

        Lines of later steps are dropped: these steps are about to be made again.
        """
        found = self._checkpoints()
        if not found:
            self._lines.unlink(missing_ok=True)
            return 0
        step = int(found[-1].name.removeprefix("step-"))
        model.load_state_dict(load_file(found[-1] / "model.safetensors"))
        optimizer.load_state_dict(torch.load(found[-1] / "optimizer.pt", weights_only=True))
        kept = [line for line in self.read() if line["step"] <= step]
        self._lines.write_text("".join(json.dumps(line) + "\n" for line in kept), encoding="utf-8")
        return step

    def _checkpoints(self) -> list[Path]:
        return sorted(self.folder.glob("step-*"))
