"""vLLM's weight transfer by NCCL, where there is none: its collectives go through vLLM's store."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any
from unittest import mock

import torch
from torch import Tensor
from vllm.distributed.device_communicators import pynccl
from vllm.distributed.utils import StatelessProcessGroup

from tests.support import cuda

_PATIENCE = 20.0  # seconds; NCCL has more


class Communicator:
    """What is asked of `PyNcclCommunicator`; like it, it waits for whoever does not come."""

    def __init__(self, group: StatelessProcessGroup, device: Any) -> None:
        self.group, self.device = group, torch.device("cpu")

    def broadcast(self, tensor: Tensor, src: int, stream: Any = None) -> None:
        tensor.copy_(self.group.broadcast(tensor, src))
        self.group.barrier(timeout=_PATIENCE)

    def destroy(self) -> None:
        """It has nothing to give back."""


@contextmanager
def answered_by_the_cpu() -> Iterator[None]:
    """Communicators are these, and what is asked of CUDA, the CPU answers."""
    with cuda.answered_by_the_cpu(), mock.patch.object(pynccl, "PyNcclCommunicator", Communicator):
        yield
