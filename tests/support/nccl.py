"""vLLM's weight transfer by NCCL, where there is none: its collectives go through vLLM's store."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from typing import Any
from unittest import mock

import torch
from torch import Tensor
from vllm.distributed.device_communicators import pynccl
from vllm.distributed.utils import StatelessProcessGroup

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


class _Stream:
    """The only one that a CPU has."""

    def __init__(self, *_: Any, **__: Any) -> None:
        pass

    def synchronize(self) -> None:
        """Everything is done already."""


@contextmanager
def answered_by_the_cpu() -> Iterator[None]:
    """Communicators, streams, the device and memory for `cuda` are the CPU's."""
    on_cpu = torch.empty

    def empty(*shape: Any, device: Any = None, **options: Any) -> Tensor:
        return on_cpu(*shape, device="cpu" if device == "cuda" else device, **options)

    answers: list[tuple[Any, str, Any]] = [
        (pynccl, "PyNcclCommunicator", Communicator),
        (torch, "empty", empty),
        (torch.accelerator, "current_device_index", lambda: 0),
        (torch.cuda, "Stream", _Stream),
        (torch.cuda, "current_stream", _Stream),
        (torch.cuda, "set_device", lambda _: None),
        (torch.cuda, "stream", contextlib.nullcontext),
    ]
    with ExitStack() as all_of_them:
        for module, name, answer in answers:
            all_of_them.enter_context(mock.patch.object(module, name, answer))
        yield
