"""A trainer and its workers in one process group, where a stack has NCCL's communicator."""

from __future__ import annotations

import socket
from datetime import timedelta
from typing import Any

import torch
from torch import Tensor
from torch.distributed import TCPStore
from torch.distributed.distributed_c10d import BroadcastOptions, ProcessGroupGloo

_PATIENCE = timedelta(minutes=2)


class Group:
    """What is asked of `PyNcclCommunicator`: to broadcast."""

    def __init__(self, host: str, port: int, rank: int, world_size: int) -> None:
        store = TCPStore(host, port, world_size, is_master=rank == 0, timeout=_PATIENCE)
        self._group = ProcessGroupGloo(store, rank, world_size, _PATIENCE)

    def broadcast(self, tensor: Tensor, src: int, stream: None = None) -> None:
        options = BroadcastOptions()
        options.rootRank, options.rootTensor = src, 0
        self._group.broadcast([tensor.view(-1).view(torch.uint8)], options).wait()


def meet(host: str, port: int, rank: int, world_size: int, device: Any = None) -> Group:
    """The group, once everybody is there."""
    return Group(host, port, rank, world_size)


def free_port() -> int:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        return int(free.getsockname()[1])
