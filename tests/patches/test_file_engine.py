"""Files for a model that flashquant does not serve: its own loader may keep all tensors at once."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file
from torch import nn

files = pytest.importorskip("flashquant.patches.transfer.files")


class Listing(nn.Module):
    def load_weights(self, weights: Any) -> None:
        self.came = dict(list(weights))


def test_a_loader_that_lists_them_has_each_tensor(tmp_path: Path) -> None:
    sent = {f"layers.{i}.weight": torch.full((4, 8), float(i)) for i in range(3)}
    save_file(sent, tmp_path / "step.safetensors")
    engine = files.FileEngine.__new__(files.FileEngine)
    engine.model, engine._folder = Listing(), tmp_path

    engine.receive_weights(files.File(path="step.safetensors"))

    assert engine.model.came.keys() == sent.keys()
    assert all(torch.equal(engine.model.came[name], tensor) for name, tensor in sent.items())
