"""A trainer in a process of its own, on the engine's GPU: its tensors travel as CUDA IPC handles.

Usage: python -m tests.engine.programs.trainer_on_gpu CHECKPOINT HANDLES

Writes what vLLM's own engine sends, pickled, and keeps the memory until its standard input ends.
"""

from __future__ import annotations

import pickle
import sys
from dataclasses import asdict
from pathlib import Path

from tests.support.gpu import ipc_engine
from tools.models import tiny_models


def main() -> None:
    """Send every weight of the checkpoint at once, and wait."""
    checkpoint, handles = map(Path, sys.argv[1:])
    weights = {name: tensor.cuda() for name, tensor in tiny_models.tensors(checkpoint).items()}

    def hand_over(update: object) -> None:
        handles.write_bytes(pickle.dumps(asdict(update)))  # type: ignore[call-overload]
        sys.stdout.write("sent\n")
        sys.stdout.flush()
        sys.stdin.read()

    engine = ipc_engine().IPCWeightTransferEngine
    engine.trainer_send_weights(iter(weights.items()), {"send_mode": hand_over})


if __name__ == "__main__":
    main()
