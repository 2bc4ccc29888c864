"""SkyRL's worker wrapper, driven as its CUDA IPC sender drives it.

Usage: python -m tests.stacks.programs.skyrl STARTS_ON PUSHED

`NewInferenceWorkerWrap` is SkyRL's own: start, chunks, finish. Not its own: CUDA's IPC (shared
memory instead), and the sender, whose loop is `push` here. `skyrl.backends` is entered without
its `__init__`, which imports the types of the Tinker API: pydantic refuses those before
Python 3.12, and they have nothing to do with weights.
"""

from __future__ import annotations

import base64
import importlib.util
import pickle
import sys
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from tests.stacks.programs import shared
from tests.stacks.programs.rollouts import print_result, raised_by, said, start
from tests.support import cuda
from tools.models import tiny_models


def _enter(package: str) -> None:
    """Make a package importable from without running its `__init__`."""
    spec = importlib.util.find_spec(package)
    assert spec is not None
    sys.modules[package] = importlib.util.module_from_spec(spec)


_enter("skyrl.backends")

from skyrl.backends.skyrl_train.inference_servers.new_inference_worker_wrap import (  # noqa: E402
    NewInferenceWorkerWrap,
)

_TENSORS_A_CHUNK = 4


class OnCpu(NewInferenceWorkerWrap):
    """The wrapper as it is; what it asks of CUDA, the CPU answers."""

    def update_weights_ipc(self, update_info: dict[str, Any]) -> None:
        with cuda.answered_by_the_cpu():
            super().update_weights_ipc(update_info)

    def forget_the_update(self) -> None:
        """What an operator would have to do after a refused finish; SkyRL has no call for it."""
        self._skyrl_weight_update_active = False


def enter_the_gym() -> None:
    """Make `skyrl_gym`, which the configuration imports, importable: the wheel nests it."""
    (folder,) = importlib.import_module("skyrl").__path__
    sys.path.append(str(Path(folder).parent / "skyrl-gym"))


def push(llm: Any, weights: dict[str, Tensor], *, lost: str = "") -> None:
    """Start, one packed buffer a chunk, finish; each by collective_rpc, as over HTTP.

    Args:
        lost: the chunk that holds this tensor is never sent.

    """
    llm.collective_rpc("skyrl_start_weight_update", kwargs={"is_checkpoint_format": True})
    pairs = list(weights.items())
    for first in range(0, len(pairs), _TENSORS_A_CHUNK):
        chunk = dict(pairs[first : first + _TENSORS_A_CHUNK])
        if lost not in chunk:
            _push_chunk(llm, chunk)
    llm.collective_rpc("skyrl_finish_weight_update")


def _push_chunk(llm: Any, chunk: dict[str, Tensor]) -> None:
    buffer = shared.Buffer(sum(tensor.nbytes for tensor in chunk.values()))
    buffer.fill(chunk.values())
    elements = sum(tensor.numel() for tensor in chunk.values())
    handles = {cuda.GPU: buffer.as_tensor(torch.bfloat16, [elements])}
    update_info = {
        "names": list(chunk),
        "dtype_names": ["bfloat16"] * len(chunk),
        "shapes": [list(tensor.shape) for tensor in chunk.values()],
        "sizes": [tensor.numel() for tensor in chunk.values()],
        "ipc_handles_pickled": base64.b64encode(pickle.dumps(handles)).decode(),
    }
    try:
        llm.collective_rpc("update_weights_ipc", args=(update_info,))
    finally:
        buffer.spoil()
        buffer.close()


def main(starts_on: str, pushed: str) -> dict[str, Any]:
    from vllm.config import WeightTransferConfig

    a, b = (tiny_models.tensors(Path(path)) for path in (starts_on, pushed))
    llm = start(
        starts_on,
        worker_extension_cls="tests.stacks.programs.skyrl.OnCpu",
        # The wrapper wants to see some engine, and asks nothing of it for IPC.
        weight_transfer_config=WeightTransferConfig(backend="flashquant_file"),
    )
    result: dict[str, Any] = {"started": said(llm)}
    push(llm, b)
    result["pushed b"] = said(llm)

    k = "model.layers.1.self_attn.k_proj.weight"
    result["a chunk missing"] = raised_by(lambda: push(llm, a, lost=k))
    result["after the missing chunk"] = said(llm)
    result["next start"] = raised_by(lambda: push(llm, a))
    llm.collective_rpc("forget_the_update")
    push(llm, a)
    result["pushed a"] = said(llm)
    norm = "model.norm.weight"
    result["refused"] = raised_by(lambda: push(llm, {**b, norm: b[norm] * torch.nan}))
    result["after refusal"] = said(llm)
    return result


if __name__ == "__main__":
    print_result(main(*sys.argv[1:]))
