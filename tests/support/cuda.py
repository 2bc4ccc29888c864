"""What vLLM and the stacks ask of CUDA around a push, answered by the CPU."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import ExitStack, contextmanager, nullcontext
from types import SimpleNamespace
from typing import Any
from unittest import mock

import torch
from torch import Tensor

GPU = "the only one"  # its unique id


class Stream:
    """The only one that a CPU has."""

    def __init__(self, *_: Any, **__: Any) -> None:
        pass

    def synchronize(self) -> None:
        """Everything is done already."""


@contextmanager
def answered_by_the_cpu() -> Iterator[None]:
    """Device, streams and synchronization are the CPU's, and so is memory for `cuda`."""
    on_cpu = torch.empty

    def empty(*shape: Any, device: Any = None, **options: Any) -> Tensor:
        return on_cpu(*shape, device="cpu" if device == "cuda" else device, **options)

    answers: list[tuple[Any, str, Any]] = [
        (torch, "empty", empty),
        (torch.accelerator, "current_device_index", lambda: 0),
        (torch.accelerator, "synchronize", lambda *_: None),
        (torch.cuda, "Stream", Stream),
        (torch.cuda, "current_device", lambda: 0),
        (torch.cuda, "current_stream", Stream),
        (torch.cuda, "get_device_properties", lambda _: SimpleNamespace(uuid=GPU)),
        (torch.cuda, "set_device", lambda _: None),
        (torch.cuda, "stream", nullcontext),
        (torch.cuda, "synchronize", lambda *_: None),
    ]
    with ExitStack() as all_of_them:
        for module, name, answer in answers:
            all_of_them.enter_context(mock.patch.object(module, name, answer))
        yield
