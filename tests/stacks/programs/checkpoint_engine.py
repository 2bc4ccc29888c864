"""checkpoint-engine's worker extension, fed as its parameter server feeds it.

Usage: python -m tests.stacks.programs.checkpoint_engine STARTS_ON PUSHED

`VllmColocateWorkerExtension` is checkpoint-engine's own, with the whole conversation over ZMQ.
Not its own: CUDA's IPC (shared memory instead), the device whose id and synchronization it asks
for, and the parameter server, whose end of the conversation is `Server` here.
"""

from __future__ import annotations

import sys
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any
from unittest import mock

import zmq
from checkpoint_engine import worker
from torch import Tensor

from tests.stacks.programs import shared
from tests.stacks.programs.rollouts import beside, print_result, raised_by, said, start
from tools.models import tiny_models

_DEVICE = "CPU-0"
_BUCKET = 1 << 18


class OnCpu(worker.VllmColocateWorkerExtension):
    """The extension as it is, on a device that it has no name for."""

    _device_uuid = _DEVICE

    def update_weights_from_ipc(self, zmq_handles: dict[str, str]) -> None:
        nothing = mock.Mock()
        cpu = SimpleNamespace(device_module=nothing)
        with mock.patch.object(worker, "DeviceManager", return_value=cpu):
            super().update_weights_from_ipc(zmq_handles)


class Server:
    """The server's end: the buffer, a message a bucket, None to let go, None to finish."""

    def __init__(self, llm: Any) -> None:
        self._llm = llm
        self._context = zmq.Context()

    def update(self, weights: dict[str, Tensor]) -> None:
        """One whole update, in buckets of one buffer that is used again and again.

        Raises:
            RuntimeError: a worker refused a bucket; the others were told to give up.

        """
        socket = self._context.socket(zmq.REQ)
        socket.setsockopt(zmq.RCVTIMEO, 30_000)  # or it would wait for ever for a dead worker
        socket.setsockopt(zmq.LINGER, 0)
        port = socket.bind_to_random_port("tcp://127.0.0.1")
        buffer = shared.Buffer(max(_BUCKET, *(tensor.nbytes for tensor in weights.values())))
        handles = {_DEVICE: f"tcp://127.0.0.1:{port}"}
        try:
            with beside(self._llm, "update_weights_from_ipc", handles):
                self._converse(socket, buffer, weights)
        finally:
            socket.close()
            buffer.close()

    def _converse(self, socket: Any, buffer: shared.Buffer, weights: dict[str, Tensor]) -> None:
        socket.send_pyobj(buffer.handle)
        answers = [socket.recv()]
        for bucket in _buckets(weights):
            socket.send_pyobj(_laid_into(buffer, bucket))
            answers.append(socket.recv())
            buffer.spoil()
            if answers[-1]:
                socket.send_pyobj(RuntimeError("some worker failed"))
                raise RuntimeError(answers[-1].decode())
        for _ in range(2):
            socket.send_pyobj(None)
            socket.recv()


def _buckets(weights: dict[str, Tensor]) -> Iterator[dict[str, Tensor]]:
    bucket: dict[str, Tensor] = {}
    for name, tensor in weights.items():
        if bucket and sum(t.nbytes for t in bucket.values()) + tensor.nbytes > _BUCKET:
            yield bucket
            bucket = {}
        bucket[name] = tensor
    yield bucket


def _laid_into(buffer: shared.Buffer, bucket: dict[str, Tensor]) -> list[dict[str, Any]]:
    offsets = buffer.fill(bucket.values())
    return [
        {"name": name, "shape": tensor.shape, "dtype": tensor.dtype, "offset": offset}
        for (name, tensor), offset in zip(bucket.items(), offsets, strict=True)
    ]


def main(starts_on: str, pushed: str) -> dict[str, Any]:
    import flashquant

    a, b = (tiny_models.tensors(Path(path)) for path in (starts_on, pushed))
    llm = start(starts_on, worker_extension_cls="tests.stacks.programs.checkpoint_engine.OnCpu")
    result: dict[str, Any] = {"started": said(llm)}
    server = Server(llm)
    server.update(b)
    result["pushed b"] = said(llm)

    first = next(iter(a))
    bad = {first: a[first] * float("nan"), **{n: t for n, t in a.items() if n != first}}
    result["refused"] = raised_by(lambda: server.update(bad))
    result["after refusal"] = said(llm)

    v = "model.layers.1.self_attn.v_proj.weight"
    result["half a layer"] = raised_by(
        lambda: server.update({name: tensor for name, tensor in a.items() if name != v})
    )
    result["pending"] = list(flashquant.status(llm).pending)
    server.update(a)
    return {**result, "pushed a": said(llm)}


if __name__ == "__main__":
    print_result(main(*sys.argv[1:]))
